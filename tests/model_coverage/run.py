"""Takes tiny random models of transformers' types through all steps, and writes a table of the outcomes.

    PYTHONPATH=tests python -m model_coverage.run [--classes causal-lm ...] [--types llama ...] [--limit 12] [--jobs 8]

Every type runs in a fork of its own, so that a crash or a hang is an outcome. Outcomes are kept in a JSON file; types
that are in it are not run again.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import transformers as tf
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .steps import try_type
from .table import write_table

TIME_LIMIT = 200  # seconds a type
MEMORY = 10 * 2**30  # bytes of address space a type, beyond those that the libraries take

Pair = tuple[str, str]  # task class, model type

_CLASSES = {  # task class: mappings of transformers that list its types; the first that has a type gives its class
    "causal-lm": ("CAUSAL_LM",),
    "encoder": ("MASKED_LM", "TEXT_ENCODING"),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION",),
    "image": ("IMAGE_CLASSIFICATION", "IMAGE"),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
}


class Run(NamedTuple):
    """A type whose process runs."""

    pair: Pair
    folder: Path
    start: float

    @property
    def outcome(self) -> Path:
        return self.folder / "outcome.json"

    @property
    def step(self) -> Path:
        return self.folder / "step.txt"

    def result(self, otherwise: str) -> dict:
        """What the process wrote; if it did not end, the step at which it was is an accident."""
        seconds = round(time.monotonic() - self.start, 1)
        step = self.step.read_text(encoding="utf-8") if self.step.exists() else "build"
        if self.outcome.exists():
            return {**json.loads(self.outcome.read_text(encoding="utf-8")), "seconds": seconds}
        outcome = "no tiny model" if step == "build" else "accident"
        return {"outcome": outcome, "step": step, "error": otherwise, "where": "", "seconds": seconds}


def types_of(task: str) -> dict[str, str]:
    """{model type: name of its model class} of a task class; encoders are bare models."""
    found: dict[str, str] = {}
    for name in _CLASSES[task]:
        for model_type, cls in _mapping(name).items():
            found.setdefault(model_type, cls)
    if task == "encoder":
        found = {name: auto.MODEL_MAPPING_NAMES[name] for name in found if name in auto.MODEL_MAPPING_NAMES}
    last = {name: cls if isinstance(cls, str) else cls[-1] for name, cls in found.items()}
    return {name: cls for name, cls in last.items() if name in CONFIG_MAPPING}


def _mapping(name: str) -> dict:
    for key in (f"MODEL_FOR_{name}_MAPPING_NAMES", f"MODEL_FOR_{name}_NAMES"):
        if hasattr(auto, key):
            return getattr(auto, key)
    return {}


def sampled(tasks: list[str], limit: int | None, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs (task class, model type), in a random order that is the same for all limits; the classes take turns."""
    rows = []
    for task in tasks:
        names = sorted(types_of(task))
        random.Random(seed).shuffle(names)
        rows += [(rank / len(names) if limit is None else rank, task, name) for rank, name in enumerate(names[:limit])]
    return [(task, name) for _, task, name in sorted(rows)]


def try_in_fork(task: str, model_type: str, time_limit: int = TIME_LIMIT) -> dict:
    """The outcome of one type: a dict as `try_type` gives it, an accident if the process dies or takes too long."""
    return next(try_in_forks([(task, model_type)], 1, time_limit))[1]


def try_in_forks(pairs: Iterable[Pair], jobs: int, time_limit: int = TIME_LIMIT) -> Iterator[tuple[Pair, dict]]:
    """Outcomes as they come, of so many types at a time. No threads: libraries forbid forks beside them."""
    waiting, running = iter(pairs), {}
    with TemporaryDirectory() as folder:
        while True:
            while len(running) < jobs and (pair := next(waiting, None)):
                run = Run(pair, Path(folder) / "-".join(pair), time.monotonic())
                run.folder.mkdir()
                child = os.fork()
                if not child:
                    _work(run)
                running[child] = run
            if not running:
                return
            time.sleep(0.05)
            for child, run in list(running.items()):
                late = time.monotonic() - run.start > time_limit
                if late:
                    os.kill(child, signal.SIGKILL)
                if os.waitpid(child, 0 if late else os.WNOHANG) != (0, 0):
                    del running[child]
                    yield run.pair, run.result(f"no answer after {time_limit} s" if late else "the process died")
                    shutil.rmtree(run.folder)


def _work(run: Run) -> None:
    """Runs in the child and ends it."""
    try:
        with open(os.devnull, "r+", encoding="utf-8") as null:
            for number in range(3):
                os.dup2(null.fileno(), number)
        os.environ["TMPDIR"] = str(run.folder)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        task, name = run.pair
        outcome = try_type(CONFIG_MAPPING[name], getattr(tf, types_of(task)[name]), run.step.write_text)
        written = run.outcome.with_suffix(".part")
        written.write_text(json.dumps(outcome), encoding="utf-8")
        written.rename(run.outcome)
    finally:
        os._exit(0)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[0]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", choices=list(_CLASSES), default=list(_CLASSES), metavar="CLASS")
    parser.add_argument("--types", nargs="+", help="only these model types; they are run again")
    parser.add_argument("--limit", type=int, help="types a class, drawn at random; all without")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--time-limit", type=int, default=TIME_LIMIT, help="seconds a type")
    parser.add_argument("--outcomes", type=Path, default=Path("model-coverage.json"), help="JSON to go on with")
    parser.add_argument("--table", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    known = json.loads(arguments.outcomes.read_text()) if arguments.outcomes.exists() else {}
    chosen = sampled(arguments.classes, None if arguments.types else arguments.limit)
    if arguments.types:
        chosen = [(task, name) for task, name in chosen if name in arguments.types]
    else:
        chosen = [(task, name) for task, name in chosen if name not in known.get(task, {})]
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()

    with contextlib.suppress(KeyboardInterrupt):
        for (task, name), outcome in try_in_forks(chosen, arguments.jobs, arguments.time_limit):
            known.setdefault(task, {})[name] = outcome
            arguments.outcomes.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print(task, name, outcome["outcome"], outcome.get("step", ""), outcome.get("error", ""), flush=True)
    if arguments.table:
        totals = {task: len(types_of(task)) for task in _CLASSES}
        write_table(arguments.table, known, totals)


if __name__ == "__main__":
    sys.exit(main())
