"""Where replies hand in their receipts: checked against what arrived, countersigned, kept beside the checkpoint."""

import logging
from collections.abc import Callable, Mapping

from icmoe.errors import IncompatibleUpdateError
from icmoe.exchange import Job, SiteReport
from icmoe.types import Arrays
from icmoe_server.receipts import Accepted, ReceiptBook

logger = logging.getLogger(__name__)


class ReceiptDesk:
    """Receipts of the replies that come in, until they are written down.

    Args:
        book: of the run.
        keys: gives site name -> registered receipt key; read again for each reply.
    """

    def __init__(self, book: ReceiptBook, *, keys: Callable[[], Mapping[str, str]]) -> None:
        self._book = book
        self._keys = keys
        self._accepted: list[Accepted] = []

    def countersigned(self, site: str) -> str:
        """What travels back to a site with its next instruction; empty for a new one."""
        known = self._book.countersigned(site)
        return "" if known is None else known.to_json()

    def take(self, text: str, *, site: str, job: Job, report: SiteReport, arrays: Arrays | None) -> None:
        """Check the receipt of a reply.

        Raises:
            ExchangeError: if it is missing, malformed, not signed by the site, or not that of this reply.
        """
        key = self._keys().get(site)
        if not text or key is None:
            raise IncompatibleUpdateError("the reply came without a receipt; run the same icmoe-fl everywhere")
        accepted = self._book.accept(text, site=site, public_key=key, job=job, report=report, arrays=arrays)
        if accepted.note:
            logger.warning("receipt of %s: %s", site, accepted.note)
        self._accepted.append(accepted)

    def write(self, server_round: int) -> None:
        """Keep what was taken since the last time, before the round's checkpoint is written.

        Raises:
            RunError: if the disk is full.
        """
        self._book.write(server_round, self._accepted)
        self._accepted.clear()

    def settle(self, server_round: int) -> None:
        """Put the receipts of a round beside its checkpoint.

        Raises:
            RunError: if the disk is full.
        """
        self._book.settle(server_round)
