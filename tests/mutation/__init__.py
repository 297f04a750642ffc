"""Faults planted in the packages, one at a time, and the tests that have to notice each.

    python -m tests.mutation            # all of them
    python -m tests.mutation captures   # those whose file or description has the word

Each fault is planted in a copy of the project, so that an interrupted run leaves nothing behind.
"""
