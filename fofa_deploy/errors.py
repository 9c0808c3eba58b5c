"""The error tree. Every message says what is wrong and what to do next.

FofaError
├── UserError            the user can fix it                                     exit 2
│   ├── PlanError        a plan, an override or a profile is wrong
│   ├── DataError        images, labels or calibration samples are wrong
│   ├── ModelError       a model name, a checkpoint or its weights are wrong
│   ├── GraphError       an ONNX file is malformed, unsafe or not what we take
│   └── IntegrityError   a file is not the one that was recorded
├── UnavailableError     this machine cannot do it                               exit 3
│   ├── BackendError     a runtime or a device is missing, or refuses
│   └── LockedError      another run holds the folder
├── StageError           a stage ran and failed                                  exit 1
│   ├── BuildError       a back end could not build or run an artifact
│   ├── TrainingError    training left the finite numbers, or missed its floor
│   └── ChildError       a child process crashed, hung or ran out of memory
└── InterruptedRunError  Ctrl-C or SIGTERM; the run resumes                      exit 130
"""

from __future__ import annotations


class FofaError(Exception):
    """Base of every error that fofa-deploy raises on purpose.

    Args:
        message: what is wrong, naming the file or value.
        action: what the user does next.
    """

    exit_code = 1

    def __init__(self, message: str, action: str) -> None:
        super().__init__(message, action)
        self.message = message
        self.action = action

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.action}"


class UserError(FofaError):
    exit_code = 2


class PlanError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class GraphError(UserError):
    pass


class IntegrityError(UserError):
    pass


class UnavailableError(FofaError):
    exit_code = 3


class BackendError(UnavailableError):
    pass


class LockedError(UnavailableError):
    pass


class StageError(FofaError):
    exit_code = 1


class BuildError(StageError):
    pass


class TrainingError(StageError):
    pass


class ChildError(StageError):
    pass


class InterruptedRunError(FofaError):
    exit_code = 130
