"""The form of a journal's records: what is read from one may have been written by anybody.

A checksum shows that a line is whole, not that it means something. What these models say is relied on by all
that replays, shows or resumes a run; keys that they do not name are left as they are.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Float32 = Annotated[float, Field(allow_inf_nan=False, ge=-3.4028234663852886e38, le=3.4028234663852886e38)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
_Text = Annotated[str, Field(max_length=100_000)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Model(_Record):
    path: _Text
    revision: _Text | None = None


class _Config(_Record):
    model: _Model


class _Engine(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: _Text


class _EngineChange(_Record):
    iteration: _Count
    engine: _Engine


class _Header(_Record):
    journal_version: _Count
    noise_version: _Count
    update_version: _Count = 1
    shardes_version: _Text
    base_headers_sha256: _Text
    base_weights_digest: _Digest
    parameters_sha256: _Text
    parameters: list[Annotated[tuple[_Count, _Text, list[_Count]], Strict(False)]]
    settings: dict[str, Any]
    config: _Config
    engine: _Engine = _Engine(name="transformers")


class _Set(_Record):
    reward: _Number | None = None
    objective: _Number | None = None
    num_failures: _Count = 0
    components: dict[str, _Number | None] = {}


class _Evaluation(_Set):
    iteration: _Count
    sets: dict[str, _Set] = {}


class _Member(_Set):
    iteration: _Count
    member: _Count
    reward: _Number | None
    num_failures: _Count
    num_tokens: _Count
    num_scored: _Count = 0
    least: _Number | None = None
    is_finite: bool = True
    by_problem: list[_Number | None] = []
    problems: list[_Count] | None = None
    by_least: Annotated[list[_Number], Field(min_length=2, max_length=2)] | None = None
    version: _Count = 1


class _Part(_Record):
    indices: list[_Count]
    values: list[_Number | None]
    has_failed: list[bool]
    components: dict[str, list[_Number | None]]
    num_tokens: _Count
    is_finite: bool
    is_short: bool
    turn_tokens: list[_Count]
    lengths: list[_Count]

    @model_validator(mode="after")
    def _columns_are_of_one_length(self) -> Self:
        count = len(self.indices)
        lengths = {"values": len(self.values)}
        lengths |= {name: len(column) for name, column in self.components.items()}
        lengths |= {"has_failed": len(self.has_failed) or count, "lengths": len(self.lengths) or count}
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"{name:.80} has {length} items, but there are {count} indices")
        return self


class _Portion(_Record):
    iteration: _Count
    round: _Count
    member: _Count
    part: _Part


class _Screening(_Record):
    num_problems: _Count
    num_left_out: _Count
    informative: list[_Count]
    agreed: list[Annotated[tuple[_Number, list[_Count]], Strict(False)]]


class _RewardStats(_Record):
    reward_snr: Annotated[_Float32, Field(ge=0)] | None = None


class _Update(_Record):
    iteration: _Count
    coefficients: list[_Float32]
    alpha: _Float32
    sigma: _Float32
    noise_iteration: _Count | None = None
    screening: _Screening | None = None
    reused: list[_Float32] = []
    shaped: list[_Number | None] = []
    instruments: _RewardStats = _RewardStats()


class _Weights(_Record):
    iteration: _Count
    digest: _Digest
    instruments: dict[str, Any] = {}


class _Probe(_Record):
    pairs: list[Annotated[tuple[list[_Count], list[_Count]], Strict(False)]]
    log_likelihoods: list[_Number]


class _Divergence(_Record):
    iteration: _Count
    kl: _Number | None


_FORMS: dict[str, type[_Record]] = {
    "header": _Header,
    "engine": _EngineChange,
    "evaluation": _Evaluation,
    "member": _Member,
    "portion": _Portion,
    "update": _Update,
    "weights": _Weights,
    "probe": _Probe,
    "kl": _Divergence,
}


def check_form(record: dict[str, Any]) -> None:
    """Check the keys of a record, as JSON has it, that this program relies on.

    Raises:
        ValueError: One is missing, or not what it must be; the message has its name.
    """
    form = _FORMS.get(str(record.get("type")))
    if form is None:
        raise ValueError(f"a record of the type {record.get('type')!r:.80} is not known")
    try:
        form.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{message}, got {first['input']!r:.80}") from None
