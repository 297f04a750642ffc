"""Faults planted in the packages, one at a time, and the test that has to notice each.

    python -m tests.mutation            # all of them
    python -m tests.mutation captures   # those whose file or description has the word
    python -m tests.mutation -n 4       # four at a time, not as many as there are cores
    python -m tests.mutation --again    # also those that are known to be caught

What was caught is kept in `.cache/mutants.jsonl` until a file of the project changes.

Each fault is planted in a copy of the project, so that an interrupted run leaves nothing behind.
"""
