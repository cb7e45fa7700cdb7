"""Stage `label`: teachers, their prompt, and how their votes are counted."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from lorapar_ray.config.base import (
    NonNegative,
    Optional0,
    PositiveFloat,
    PositiveInt,
    Section,
    System,
    Word,
    names_in,
    require_last_words,
)
from lorapar_ray.config.engine import EngineConfig, Resources, require_gpu_for_each_rank
from lorapar_ray.config.marks import Operation, Result
from lorapar_ray.config.ranges import NumberOrRange, Ranged


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


class TeacherConfig(Ranged):
    """One voter: hosted here on Ray Serve, a remote OpenAI-compatible endpoint, or the user's Python class."""

    name: Result[Word]
    """The teacher's name in labels and reports."""
    kind: Result[Literal["serve", "remote", "python"]] = "serve"
    """`python`: `model` is `module:Class`, see `lorapar_ray.labeling.teachers`."""
    model: Result[str]
    """As `model.path`; for a remote teacher the model name at its endpoint; for `python` `module:Class`."""
    revision: Result[str | None] = None
    """Hub revision of a hosted model; for a remote one or a Python class, any word; change it when the endpoint's model
    or the class changes. Cached votes belong to one revision, also after `--redo label`."""
    engine: Result[EngineConfig] = EngineConfig()
    """Engine settings, for kind: serve."""
    engine_of: Operation[Word | None] = None
    """Answer with the engine of this hosted teacher, which must have the same model and engine settings: two teachers
    that differ in their prompt then need one engine. This one's resources and replicas are not used."""
    resources: Operation[Resources] = Resources()
    """Resources of one replica. `gpus` below 1 shares a GPU; with `engine.tensor_parallel` N set it to N."""
    replicas: Operation[NumberOrRange] = 1
    """Engines that serve this teacher in parallel. A range, `[1, 4]`: as many as its requests need (autoscaling)."""
    max_replicas: Operation[PositiveInt | None] = None
    """The most replicas, where `replicas` is not a list: an older spelling of a range."""
    max_ongoing_requests: Operation[PositiveInt | None] = None
    """In-flight cap per replica: large enough to keep the engine's batch full, small enough for backpressure. None: 1.5
    × `engine.max_num_seqs`, so that the next batch waits at the engine and not on another node."""
    use_chat_template: Result[bool | None] = None
    """Use the tokenizer's chat template; None: if it has one."""
    example_order: Result[Literal["system1_first", "system2_first"]] = "system1_first"
    """Which of the prompt's examples comes first."""
    thinking_tokens: Result[Optional0] = 0
    """Free text a reasoning model may write before the constrained choice."""
    base_url: Result[str | None] = None
    """URL of a remote endpoint, such as `https://host/v1`."""
    endpoint: Result[Literal["completions", "chat"]] = "completions"
    """Remote only. `chat` for services without text completion; the vote is the last token that is a valid choice."""
    extra_body: Result[dict[str, Any]] = {}
    """Added to every request of a remote teacher, such as `{structured_outputs: {choice: ["1", "2"]}}` for vLLM's
    server. A Python class receives it with its config."""
    api_key_env: Operation[str | None] = None
    """The environment variable that holds the endpoint's key; the key itself is never stored."""
    requests_per_second: Operation[PositiveFloat | None] = None
    """Remote only: rate limit over all asking workers."""
    cost_per_million_tokens: Result[NonNegative] = 0.0
    """Price of a remote teacher, for `sequential` and the report."""
    cost_per_hour: Result[NonNegative] = 0.0
    """Price of one hosted replica, for `sequential` and the report."""

    @property
    def has_engine(self) -> bool:
        """Whether an engine of its own is hosted for it."""
        return self.kind == "serve" and self.engine_of is None

    @property
    def ongoing_requests(self) -> int:
        """Requests that one replica holds at once, waiting or computing."""
        return self.max_ongoing_requests or -(-3 * self.engine.max_num_seqs // 2)

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> TeacherConfig:
        if (self.kind == "remote") != (self.base_url is not None):
            raise ValueError("base_url: required for kind: remote, and not allowed for other kinds")
        if self.base_url is not None and not _is_address(self.base_url):
            raise ValueError("base_url: write it as https://host/v1")
        if self.engine_of is not None and self.kind != "serve":
            raise ValueError(f"engine_of: kind {self.kind} has no engine; remove it")
        require_gpu_for_each_rank("resources", self.resources, "engine", self.engine)
        return self


class VoteExample(Section):
    """One worked example in the voting prompt."""

    question: Result[str]
    """The question."""
    answer: Result[str]
    """Its answer."""
    system: Result[System]
    """The System that it belongs to."""


class VotePrompt(Section):
    """The text of the voting prompt, in the order it is read; `{names}` are filled in, `{{` is a plain brace."""

    role: Result[str] = "Act as the language model {student}. "
    """Not used by strategy `single`."""
    task: Result[str] = "Decide which System a question belongs to."
    """The task."""
    definition: Result[str] = "System {system}: {meaning}."
    """One line for each System."""
    question: Result[str] = "Question: {question}\nAnswer: {answer}"
    """Format of the examples and of the question itself."""
    choice: Result[str] = "System:"
    """The last words of the prompt; the next token is the number of a System."""

    @model_validator(mode="after")
    def _names_are_known(self) -> VotePrompt:
        needed = {"role": {"student"}, "definition": {"system", "meaning"}, "question": {"question", "answer"}}
        for name, text in self.model_dump().items():
            found = names_in(text, name)
            wanted = needed.get(name, set())
            if not found <= wanted or (name != "role" and found != wanted):
                names = " and ".join(f"{{{field}}}" for field in sorted(wanted)) or "no {name}"
                raise ValueError(f"{name}: takes {names}, got {text!r}")
        require_last_words(self.choice)
        return self


class LabelConfig(Section):
    """Stage `label`: which System each training question belongs to (paper, section 3.1)."""

    strategy: Result[Literal["vote", "single", "single_roleplay", "random", "source"]] = "vote"
    """`vote`: the majority of teachers that play the student. `single`, `single_roleplay`: one teacher, as itself or as
    the student. `random`: random labels, a baseline. `source`: the System that each entry of `data.train` gives its
    rows."""
    teachers: Result[list[TeacherConfig]] = []
    """The models that vote, each by its own name; none for `random` and `source`."""
    student_name: Result[str | None] = None
    """Name of the student in the prompt; None: the last part of `model.path`."""
    definitions: Result[dict[System, str]] = {
        1: "the student answers at once, from recall, reading comprehension or one simple inference",
        2: "the student has to reason in several steps: multi-step logic, chaining information, complex inference",
    }
    """Definitions of Systems 1..K; two in the paper, up to nine here."""
    examples: Result[list[VoteExample]] = [
        VoteExample(question="What is the capital of France?", answer="Paris", system=1),
        VoteExample(
            question="A shop sells pens at 3 for $2. Tom buys 12 pens and pays with $20. How much change does he get?",
            answer="12",
            system=2,
        ),
    ]
    """Shown in the prompt before the question."""
    prompt: Result[VotePrompt] = VotePrompt()
    """The words of the voting prompt."""
    calibration: Result[Literal["none", "content_free", "swapped_definitions", "batch"]] = "content_free"
    """How a teacher's bias is removed. `content_free` divides out its answers to questions without content.
    `swapped_definitions` asks K times, so that each definition has each number once, and averages. `batch` divides out
    the median over a sample of the questions, so that every teacher splits them about evenly; for small teachers with a
    strong bias."""
    calibration_rows: Result[PositiveInt] = 48
    """Size of the sample for `batch`. If the questions are of a few distinct kinds, the median of a small sample may
    fall among one kind: then more rows give labels that depend less on the seed."""
    weights: Result[Literal["equal", "confidence"]] = "equal"
    """`confidence`: a vote counts as much as its calibrated probability."""
    shuffled: Result[bool] = False
    """A control: the labels are shuffled among the questions; each System keeps its number of labels. A gain that
    remains does not come from the votes."""
    quorum: Operation[PositiveInt] = 1
    """Minimum number of teachers that still answer; with fewer the stage stops and can be resumed."""
    concurrency: Operation[PositiveInt] = 64
    """Questions in flight per asking worker."""
    workers: Operation[PositiveInt] = 1
    """Ray Data workers that ask."""
    rows_per_block: Operation[PositiveInt] = 64
    """Questions that are asked and stored as one unit of work."""
    timeout_s: Operation[PositiveFloat] = 120.0
    """Time limit of one request, including the wait in a hosted engine's queue."""
    retries: Operation[Optional0] = 2
    """Retries of a request after a temporary failure."""
    backoff_s: Operation[PositiveFloat] = 1.0
    """Wait before the first retry; doubled for each further one. An endpoint's Retry-After header overrides it."""
    give_up_after: Operation[PositiveInt] = 16
    """After this many failed questions in a row (retries included) a teacher abstains for the rest of the run."""
    sequential: Result[bool] = False
    """Stop asking once the majority is decided. The cheapest teacher is asked first, by `cost_per_million_tokens` and
    `cost_per_hour`; without prices, in the given order."""
    cache: Operation[str | None] = None
    """A file of votes that several runs share; None: one of the run's own. On a network file system, where SQLite's
    locks are not reliable, new votes are in a journal beside it, the folder `FILE.journal`."""
    resources: Operation[Resources] = Resources(cpus=0.5, gpus=0)
    """Resources of one asking worker."""

    @property
    def voted(self) -> bool:
        """Whether teachers vote."""
        return self.strategy not in ("random", "source")

    @model_validator(mode="after")
    def _teachers_fit_strategy(self) -> LabelConfig:
        names = [t.name for t in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teachers: two teachers share a name")
        for teacher in self.teachers:
            _require_engine(teacher, self.teachers)
        if self.strategy == "vote" and not self.teachers:
            raise ValueError("teachers: strategy vote needs at least one teacher")
        if self.strategy.startswith("single") and len(self.teachers) != 1:
            raise ValueError(f"teachers: strategy {self.strategy} takes exactly one teacher")
        if self.shuffled and not self.voted:
            raise ValueError(f"shuffled: is a control for votes, and strategy {self.strategy} has no votes; remove it")
        if self.voted and self.quorum > len(self.teachers):
            raise ValueError(f"quorum: {self.quorum} is more than the {len(self.teachers)} teachers")
        systems = sorted(self.definitions)
        if systems != list(range(1, len(systems) + 1)) or not 2 <= len(systems) <= 9:
            raise ValueError(f"definitions: Systems must be numbered 1 to K with K from 2 to 9, got {systems}")
        for example in self.examples:
            if example.system not in self.definitions:
                raise ValueError(f"examples: System {example.system} has no definition")
        return self


def _require_engine(teacher: TeacherConfig, teachers: list[TeacherConfig]) -> None:
    """Check that the teacher whose engine `teacher` uses has the same one."""
    if teacher.engine_of is None:
        return
    where = f"teachers: '{teacher.name}': engine_of"
    owner = next((each for each in teachers if each.name == teacher.engine_of and each.has_engine), None)
    if owner is None:
        known = ", ".join(each.name for each in teachers if each.has_engine) or "none"
        raise ValueError(f"{where}: no teacher '{teacher.engine_of}' with an engine of its own; known: {known}")
    for name in ("model", "revision", "engine"):
        if getattr(teacher, name) != getattr(owner, name):
            raise ValueError(f"{where}: '{owner.name}' has another {name}; make them equal, or remove engine_of")
