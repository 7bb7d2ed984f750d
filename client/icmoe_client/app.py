"""The ClientApp: one message in, one reply out. The same app runs in the simulation and at a hospital."""

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from icmoe.config import RunConfig, parse_run_config
from icmoe.errors import ConfigError, ExchangeError, IcmoeError, PrivacyError
from icmoe.flower import pack_report, pack_site_name, reply, unpack_instruction
from icmoe_client.site import Site
from icmoe_client.trainer import carry_out, simulated_dropout

SITE_ERROR = 100
"""Code of our error replies; Flower's own codes are below."""

# The text of these never names a file, a patient or a pixel value; that of the others may.
_SAFE_TO_SEND = (ExchangeError, PrivacyError)
logger = logging.getLogger(__name__)


def make_client_app(
    resolve_site: Callable[[Context], Site],
    *,
    admit: Callable[[RunConfig], None] = lambda run: None,
    simulated: bool = False,
) -> ClientApp:
    """Build the app.

    Args:
        resolve_site: tells from Flower's context which site this process is; opens its manifest.
        admit: raises ``PolicyError`` for a run that this site does not allow; called before ``resolve_site``.
        simulated: lets ``simulation.dropout`` fail rounds, and sites say their name.

    Returns:
        An app that answers ``train`` and ``evaluate``, and in a simulation ``query`` (who are you).
    """
    app = ClientApp()

    def work(message: Message, context: Context) -> Message:
        try:
            instruction, arrays = unpack_instruction(message.content)
            run = _read_run(instruction.run_json)
            admit(run)
            site = resolve_site(context)
            train = instruction.job == "train"
            if simulated and train and simulated_dropout(run, site.name, instruction.server_round):
                return _refusal(message, "simulated dropout")
            outgoing = carry_out(site, instruction, arrays)
            return reply(message, pack_report(outgoing.report, outgoing.arrays, receipt=outgoing.receipt))
        except IcmoeError as error:
            logger.error("%s", error)
            return _refusal(message, describe_for_centre(error))
        except Exception as error:
            # Flower would send the text of the exception; it may hold a path or a pixel value.
            logger.exception("internal error")
            return _refusal(message, f"internal error ({type(error).__name__}); the site's log has the details")

    if simulated:
        # A real centre knows its sites by their keys, and what a query answers would not pass the guard.
        @app.query()
        def query(message: Message, context: Context) -> Message:
            return reply(message, pack_site_name(resolve_site(context).name))

    app.train()(work)
    app.evaluate()(work)
    return app


def _read_run(text: str) -> RunConfig:
    """The centre's run config; what is wrong with it may be told to the centre, which wrote it."""
    try:
        return parse_run_config(text, source="the centre's run config")
    except ConfigError as error:
        raise ExchangeError(str(error)) from error


def describe_for_centre(error: IcmoeError) -> str:
    """Text of an error that may leave the site."""
    if isinstance(error, _SAFE_TO_SEND):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}; the site's log has the details"


def _refusal(message: Message, reason: str) -> Message:
    return Message(Error(code=SITE_ERROR, reason=reason), reply_to=message)
