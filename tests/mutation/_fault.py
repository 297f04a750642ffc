"""A fault: a small replacement in one file, and the test that has to fail."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with the project once ``old`` is replaced by ``new``.

    Attributes:
      what: the mistake, in words.
      file: path of the file from the root of the project.
      old: text that stands in the file exactly once.
      new: text that takes its place.
      test: what pytest calls the test that has to fail. The whole suite would notice more; one test
        that says what is wrong makes it quick to run all faults.
    """

    what: str
    file: str
    old: str
    new: str
    test: str

    def planted(self, source: str) -> str:
        """``source`` with the fault.

        Raises:
          ValueError: the text is not there once: the fault has to be written anew.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file}: {self.what!r}: the text to replace is there {count} times, not "
                f"once; write the fault for the code as it is now:\n{self.old}"
            )
        return source.replace(self.old, self.new)
