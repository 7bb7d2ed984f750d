"""Every error a user can meet, as one tree.

::

    IcmoeError
    ├── ConfigError                     exit 2   wrong use or a wrong value in a config file
    ├── BackboneError                   exit 2   pretrained weights missing, wrong or changed
    ├── DataError                       exit 3   images, masks, splits
    │   ├── ManifestError
    │   └── MaskError
    ├── PrivacyError                    exit 4   a site says no
    │   ├── PolicyError
    │   └── BudgetExhaustedError
    ├── NetworkError                    exit 5
    │   ├── ConnectError
    │   ├── AuthError
    │   └── TlsError
    ├── ExchangeError                   exit 6   what travelled is not what was agreed
    │   └── IncompatibleUpdateError
    ├── CheckpointError                 exit 6
    └── RunError                        exit 6   the run failed or the disk is full

A message says what was given, what is allowed and what to do next. Messages of errors that may cross the wire
(``PrivacyError``, ``ExchangeError``) never name a file, a patient or a pixel value.
"""

from typing import ClassVar

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130


class IcmoeError(Exception):
    """Base of all errors of this project; the command line turns it into a message and ``exit_code``."""

    exit_code: ClassVar[int] = 6


class ConfigError(IcmoeError):
    """A config file or a command line is wrong."""

    exit_code = 2


class BackboneError(IcmoeError):
    """Pretrained weights are missing, are not the published ones, or changed during a run."""

    exit_code = 2


class DataError(IcmoeError):
    """Images of a site cannot be used as they are."""

    exit_code = 3


class ManifestError(DataError):
    """``manifest.csv`` is missing, malformed or contradicts itself."""


class MaskError(DataError):
    """A mask holds a value without a class, or does not fit its image."""


class PrivacyError(IcmoeError):
    """A site refuses because privacy would suffer."""

    exit_code = 4


class PolicyError(PrivacyError):
    """The run asks for something the site's policy does not allow."""


class BudgetExhaustedError(PrivacyError):
    """The round would pass the site's privacy budget."""


class NetworkError(IcmoeError):
    """The other side cannot be reached or trusted."""

    exit_code = 5


class ConnectError(NetworkError):
    """No connection."""


class AuthError(NetworkError):
    """The key is unknown, revoked or in use."""


class TlsError(NetworkError):
    """The certificate is not trusted."""


class ExchangeError(IcmoeError):
    """A message between server and site is not what both agreed on."""


class IncompatibleUpdateError(ExchangeError):
    """An update has other tensors, shapes or digests than the global model."""


class CheckpointError(IcmoeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class RunError(IcmoeError):
    """The run as a whole failed."""
