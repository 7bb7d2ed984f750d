from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StopWhen(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_WHEN_UNSPECIFIED: _ClassVar[StopWhen]
    AFTER_ROUND: _ClassVar[StopWhen]
    NOW: _ClassVar[StopWhen]
STOP_WHEN_UNSPECIFIED: StopWhen
AFTER_ROUND: StopWhen
NOW: StopWhen

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRoundsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "state", "round", "num_rounds", "reason", "updated", "roll_call", "children", "stop_asked")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    ROLL_CALL_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    STOP_ASKED_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: str
    round: int
    num_rounds: int
    reason: str
    updated: str
    roll_call: _containers.RepeatedCompositeFieldContainer[SiteState]
    children: _containers.RepeatedCompositeFieldContainer[ChildProcess]
    stop_asked: str
    def __init__(self, run: _Optional[str] = ..., state: _Optional[str] = ..., round: _Optional[int] = ..., num_rounds: _Optional[int] = ..., reason: _Optional[str] = ..., updated: _Optional[str] = ..., roll_call: _Optional[_Iterable[_Union[SiteState, _Mapping]]] = ..., children: _Optional[_Iterable[_Union[ChildProcess, _Mapping]]] = ..., stop_asked: _Optional[str] = ...) -> None: ...

class SiteState(_message.Message):
    __slots__ = ("site", "state", "since", "reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    site: str
    state: str
    since: str
    reason: str
    def __init__(self, site: _Optional[str] = ..., state: _Optional[str] = ..., since: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ChildProcess(_message.Message):
    __slots__ = ("name", "pid", "state", "restarts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    state: str
    restarts: int
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., restarts: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("round", "status")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    round: RoundRecord
    status: RunStatus
    def __init__(self, round: _Optional[_Union[RoundRecord, _Mapping]] = ..., status: _Optional[_Union[RunStatus, _Mapping]] = ...) -> None: ...

class RoundRecord(_message.Message):
    __slots__ = ("round", "evaluate_only", "scored_round", "asked", "answered", "failed", "quarantined", "refused", "missing", "val_dice", "train_loss", "bytes_up", "bytes_down", "expert_shares", "epsilon", "aggregated", "late", "seconds", "waited")
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class QuarantinedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MissingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class ValDiceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TrainLossEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class BytesUpEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BytesDownEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ExpertSharesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ExpertShares
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ExpertShares, _Mapping]] = ...) -> None: ...
    class EpsilonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    SCORED_ROUND_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    VAL_DICE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARES_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    AGGREGATED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    round: int
    evaluate_only: bool
    scored_round: int
    asked: _containers.RepeatedScalarFieldContainer[str]
    answered: _containers.RepeatedScalarFieldContainer[str]
    failed: _containers.ScalarMap[str, str]
    quarantined: _containers.ScalarMap[str, str]
    refused: _containers.ScalarMap[str, str]
    missing: _containers.ScalarMap[str, str]
    val_dice: _containers.ScalarMap[str, float]
    train_loss: _containers.ScalarMap[str, float]
    bytes_up: _containers.ScalarMap[str, int]
    bytes_down: _containers.ScalarMap[str, int]
    expert_shares: _containers.MessageMap[str, ExpertShares]
    epsilon: _containers.ScalarMap[str, float]
    aggregated: bool
    late: int
    seconds: float
    waited: float
    def __init__(self, round: _Optional[int] = ..., evaluate_only: bool = ..., scored_round: _Optional[int] = ..., asked: _Optional[_Iterable[str]] = ..., answered: _Optional[_Iterable[str]] = ..., failed: _Optional[_Mapping[str, str]] = ..., quarantined: _Optional[_Mapping[str, str]] = ..., refused: _Optional[_Mapping[str, str]] = ..., missing: _Optional[_Mapping[str, str]] = ..., val_dice: _Optional[_Mapping[str, float]] = ..., train_loss: _Optional[_Mapping[str, float]] = ..., bytes_up: _Optional[_Mapping[str, int]] = ..., bytes_down: _Optional[_Mapping[str, int]] = ..., expert_shares: _Optional[_Mapping[str, ExpertShares]] = ..., epsilon: _Optional[_Mapping[str, float]] = ..., aggregated: bool = ..., late: _Optional[int] = ..., seconds: _Optional[float] = ..., waited: _Optional[float] = ...) -> None: ...

class ExpertShares(_message.Message):
    __slots__ = ("shares",)
    class SharesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SHARES_FIELD_NUMBER: _ClassVar[int]
    shares: _containers.ScalarMap[str, float]
    def __init__(self, shares: _Optional[_Mapping[str, float]] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("when",)
    WHEN_FIELD_NUMBER: _ClassVar[int]
    when: StopWhen
    def __init__(self, when: _Optional[_Union[StopWhen, str]] = ...) -> None: ...

class StopReply(_message.Message):
    __slots__ = ("when", "round")
    WHEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    when: StopWhen
    round: int
    def __init__(self, when: _Optional[_Union[StopWhen, str]] = ..., round: _Optional[int] = ...) -> None: ...
