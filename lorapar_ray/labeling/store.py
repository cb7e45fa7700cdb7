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
KEYS = {"answers": "question, teacher", "failures": "run, question, teacher"}
"""Primary keys."""
TEMPORARY = ""
"""SQLite's name for a database in a temporary file, which no other process sees, and which ends with this one."""
LOOKED_UP_AT_ONCE = 400
TAKEN_AT_ONCE = 1000
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
            journal: folder of a `Journal` that gets every entry. The database is rebuilt from it, on this machine's
                disk for temporary files; if `path` exists, its entries count too and are copied to the journal.

        Raises:
            UserError: it cannot be opened, or is something else.
        """
        self._path = path if journal is None else journal
        self._journal: Journal | None = None
        with self._clear_errors(self._path):
            if journal is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # before SQLite makes it readable to all; its journals copy the mode
            self._database = sqlite3.connect(TEMPORARY if journal is not None else path, timeout=WAIT_S)
            self._database.executescript(TABLES)
            if journal is not None:
                self._journal = Journal(journal)
                self._replay(self._journal)
        if journal is not None and path.is_file():
            with self._clear_errors(path):
                self._take_over(path)

    def answers(self, questions: Sequence[bytes]) -> dict[bytes, dict[bytes, Answer]]:
        """The stored answers to some questions: {question: {teacher key: answer}}."""
        found: dict[bytes, dict[bytes, Answer]] = {}
        wanted = "question, teacher, log_probs, tokens, latency_s, run"
        for part in _parts(questions):
            query = f"SELECT {wanted} FROM answers WHERE question IN ({_marks(part)})"
            with self._clear_errors(self._path):
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
        with self._clear_errors(self._path):
            self._add(rows, failed)

    def _add(self, answers: Rows, failures: Rows) -> None:
        if self._journal is not None:
            self._journal.add(
                [[question.hex(), teacher.hex(), *rest] for question, teacher, *rest in answers],
                [[run, question.hex(), *rest] for run, question, *rest in failures],
            )
        self._insert(answers, failures)

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

    def _take_over(self, file: Path) -> None:
        """Add the entries of another file that are not here yet."""
        self._database.execute("ATTACH DATABASE ? AS earlier", [str(file)])
        there = {name for (name,) in self._database.execute("SELECT name FROM earlier.sqlite_master")}
        for table, key in KEYS.items():
            if table in there:  # a kill may have left an empty file
                self._database.execute(
                    f"CREATE TEMP TABLE missing AS SELECT * FROM earlier.{table} WHERE ({key}) NOT IN "
                    f"(SELECT {key} FROM main.{table})"
                )
                found = self._database.execute("SELECT * FROM missing")
                try:
                    while some := [list(row) for row in found.fetchmany(TAKEN_AT_ONCE)]:
                        self._add(*((some, []) if table == "answers" else ([], some)))
                except (AttributeError, ValueError) as error:  # SQLite allows any type in any column
                    raise sqlite3.DatabaseError("a stored answer is damaged") from error
                self._database.execute("DROP TABLE missing")
        self._database.commit()
        self._database.execute("DETACH DATABASE earlier")

    def failures(self, run: str, questions: Sequence[bytes]) -> dict[bytes, dict[str, str]]:
        """Why teachers failed on some questions: {question: {teacher name: reason}}; they may have answered later."""
        found: dict[bytes, dict[str, str]] = {}
        for part in _parts(questions):
            query = f"SELECT question, teacher, reason FROM failures WHERE run = ? AND question IN ({_marks(part)})"
            with self._clear_errors(self._path):
                for question, teacher, reason in self._database.execute(query, [run, *part]):
                    found.setdefault(question, {})[teacher] = reason
        return found

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    @contextmanager
    def _clear_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise no_space(path) from error
            raise UserError(f"label.cache: '{path}' cannot be used ({error}); name another file") from error
        except OSError as error:
            raise UserError(f"label.cache: '{path}' cannot be written ({error.strerror}); name another") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of names that are no text
            raise UserError(
                f"label.cache: '{path}' is not a vote cache ({error}); delete it or name another"
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
