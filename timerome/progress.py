"""Progress with the time left, on stderr: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

Step = Callable[[int], None]
Report = Callable[[int, int, str], None]


class Progress:
    """Shows how far a computation is; made once by each command and passed down.

    Args:
        enabled: False shows nothing.
        stream: where to write; stderr by default. On a terminal each task is a bar; elsewhere it is a line when it
            ends, if it took a second, and one every ``interval`` seconds before that.
        interval: seconds between lines where there is no terminal.

    Example:
        >>> progress = Progress(enabled=False)
        >>> with progress.task("count", total=3) as step:
        ...     for _ in range(3):
        ...         step(1)
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None, interval: float = 15.0) -> None:
        self.enabled, self.stream, self.interval = enabled, stream or sys.stderr, interval

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Step]:
        """Show a task of ``total`` units; yields a function that counts some of them as done.

        The display ends with the block, also on an exception or a keyboard interrupt.
        """
        if not self.enabled:
            yield _ignore
        elif self.stream.isatty():
            with self._bar(label, total) as step:
                yield step
        else:
            yield from self._lines(label, total)

    @contextmanager
    def reports(self, label: str) -> Iterator[Report]:
        """Yield a function that is told (done, total, what is running), as ``CausalTracer(progress=...)`` wants.

        Where the total changes, a further task begins.
        """
        with ExitStack() as stack:
            part, last_total, last_done = 0, -1, 0
            step: Step = _ignore

            def report(done: int, total: int, detail: str = "") -> None:
                nonlocal part, last_total, last_done, step
                if total != last_total:
                    stack.close()
                    part, last_total, last_done = part + 1, total, 0
                    step = stack.enter_context(self.task(label if part == 1 else f"{label}, part {part}", total))
                step(done - last_done)
                last_done = done

            yield report

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Step]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=Console(file=self.stream)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)

    def _lines(self, label: str, total: int) -> Iterator[Step]:
        done, begin = 0, time.monotonic()
        last = begin

        def step(n: int) -> None:
            nonlocal done, last
            done, now = done + n, time.monotonic()
            if done < total and now - last >= self.interval:
                last = now
                left = (now - begin) * (total - done) / max(done, 1)
                print(f"{label}: {done}/{total}, about {left:.0f} s left", file=self.stream, flush=True)

        yield step
        seconds = time.monotonic() - begin
        if seconds >= min(1.0, self.interval):
            print(f"{label}: {done}/{total} in {seconds:.1f} s", file=self.stream, flush=True)


def _ignore(n: int) -> None:
    pass


SILENT = Progress(enabled=False)
