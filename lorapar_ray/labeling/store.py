"""All teachers' answers on disk: a resumed run or a new teacher does not ask for them again.

One SQLite file that only the driver writes, a block of questions at a time, so a kill loses only the blocks in flight.
Answers are stored uncalibrated (the teacher's log-probabilities): another calibration or weighting needs no new
requests. Memory does not grow with the rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.files import no_space
from lorapar_ray.labeling.journal import Journal, Rows
from lorapar_ray.text import one_line

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    question BLOB, teacher BLOB, log_probs TEXT, tokens INTEGER, latency_s REAL, run TEXT,
    PRIMARY KEY (question, teacher)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    run TEXT, question BLOB, teacher TEXT, reason TEXT, PRIMARY KEY (run, question, teacher)
) WITHOUT ROWID;
"""
LOOKED_UP_AT_ONCE = 400
WAIT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to one prompt."""

    log_probs: list[float]
    """Log-probability of each System, before calibration."""
    tokens: int
    """Tokens that the teacher read and wrote, including cached ones."""
    latency_s: float
    run: str = ""
    """Which run asked for it."""


def question_key(prompt: str, answer: str) -> bytes:
    """Digest of a question with its answer: both are in the voting prompt."""
    return blake2b(f"{prompt}\0{answer}".encode(errors="surrogatepass"), digest_size=16).digest()


class VoteStore:
    """Answers by (question, teacher key); see `lorapar_ray.labeling.keys` for the latter."""

    def __init__(self, path: Path, journal: Path | None = None) -> None:
        """Open or create the file; only its owner may read a new one, since reasons quote services' messages.

        Args:
            journal: folder of a `Journal` that gets every entry; the file is rebuilt from it.

        Raises:
            UserError: it cannot be opened, or is something else.
        """
        self._path = path if journal is None else journal
        self._journal: Journal | None = None
        with self._clear_errors():
            if journal is not None:
                path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # before SQLite makes it readable to all; its journals copy the mode
            self._database = sqlite3.connect(path, timeout=WAIT_S)
            self._database.executescript(TABLES)
            if journal is not None:
                self._journal = Journal(journal)
                self._replay(self._journal)

    def answers(self, questions: Sequence[bytes]) -> dict[bytes, dict[bytes, Answer]]:
        """The stored answers to some questions: {question: {teacher key: answer}}."""
        found: dict[bytes, dict[bytes, Answer]] = {}
        wanted = "question, teacher, log_probs, tokens, latency_s, run"
        for part in _parts(questions):
            query = f"SELECT {wanted} FROM answers WHERE question IN ({_marks(part)})"
            with self._clear_errors():
                for question, teacher, *columns in self._database.execute(query, part):
                    found.setdefault(question, {})[teacher] = _answer(*columns)
        return found

    def add(
        self, answers: Iterable[tuple[bytes, bytes, Answer]], failures: Iterable[tuple[str, bytes, str, str]] = ()
    ) -> None:
        """Store (question, teacher key, answer) and (run, question, teacher name, reason), all or nothing."""
        rows: Rows = [
            [question, teacher, json.dumps(found.log_probs), found.tokens, found.latency_s, found.run]
            for question, teacher, found in answers
        ]
        failed: Rows = [list(each) for each in failures]
        with self._clear_errors():
            if self._journal is not None:
                self._journal.add(
                    [[question.hex(), teacher.hex(), *rest] for question, teacher, *rest in rows],
                    [[run, question.hex(), *rest] for run, question, *rest in failed],
                )
            self._insert(rows, failed)

    def _insert(self, answers: Rows, failures: Rows) -> None:
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", answers)
            self._database.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", failures)

    def _replay(self, journal: Journal) -> None:
        try:
            for answers, failures in journal.rows():
                self._insert(
                    [[bytes.fromhex(question), bytes.fromhex(teacher), *rest] for question, teacher, *rest in answers],
                    [[run, bytes.fromhex(question), *rest] for run, question, *rest in failures],
                )
        except (ValueError, KeyError, TypeError, RecursionError, sqlite3.ProgrammingError) as error:
            raise sqlite3.DatabaseError(f"a line is damaged: {one_line(error, 80)}") from error

    def failures(self, run: str, questions: Sequence[bytes]) -> dict[bytes, dict[str, str]]:
        """Why teachers failed on some questions: {question: {teacher name: reason}}; they may have answered later."""
        found: dict[bytes, dict[str, str]] = {}
        for part in _parts(questions):
            query = f"SELECT question, teacher, reason FROM failures WHERE run = ? AND question IN ({_marks(part)})"
            with self._clear_errors():
                for question, teacher, reason in self._database.execute(query, [run, *part]):
                    found.setdefault(question, {})[teacher] = reason
        return found

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise no_space(self._path) from error
            raise UserError(f"label.cache: '{self._path}' cannot be used ({error}); name another file") from error
        except OSError as error:
            raise UserError(
                f"label.cache: '{self._path}' cannot be written ({error.strerror}); name another"
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of names that are no text
            raise UserError(
                f"label.cache: '{self._path}' is not a vote cache ({error}); delete it or name another"
            ) from error


def _answer(log_probs: object, tokens: object, latency_s: object, run: object) -> Answer:
    """An answer as it is stored; SQLite allows any type in any column.

    Raises:
        sqlite3.DatabaseError: it is not an answer.
    """
    try:
        numbers = [float(value) for value in json.loads(log_probs)]  # type: ignore[arg-type]
        if not numbers or not all(map(isfinite, numbers)):
            raise ValueError
        return Answer(numbers, int(tokens), float(latency_s), str(run))  # type: ignore[call-overload,arg-type]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise sqlite3.DatabaseError("a stored answer is damaged") from error


def _parts(questions: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (questions[start : start + LOOKED_UP_AT_ONCE] for start in range(0, len(questions), LOOKED_UP_AT_ONCE))


def _marks(part: Sequence[bytes]) -> str:
    return ",".join("?" * len(part))
