"""Ask a SuperLink whether it knows a site's key. Part of the adapter ``icmoe.flower_engine``: Flower's internals.

The question is the call with which a SuperNode begins, but with a heartbeat interval that Flower allows to nobody.
Flower checks the signature first, then looks the key up, and only then judges the interval: so its refusal tells
whether the key is known, and nothing has changed. A SuperNode at work with the same key notices nothing, and no round
can take the question for a site that came online. Whether the key is in use cannot be told without changing that.
"""

import ssl

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from icmoe.errors import AuthError, ConnectError
from icmoe.flower_engine import CALL_TIMEOUT

NO_INTERVAL = 0.0
"""Seconds; Flower wants 10 to 1800."""

_PATH, _METHOD = "/v1/fleet/activate-node", "/flwr.proto.Fleet/ActivateNode"
_MEDIA_TYPE = "application/protobuf"
_NEVER_PROXIED = ("all://127.0.0.1", "all://localhost")


def knows_key(server: str, *, tls: ssl.SSLContext, key: EllipticCurvePrivateKey) -> bool:
    """Whether a centre lets a key take part. Changes nothing there.

    Args:
        server: ``host:port`` of the gateway.
        tls: trusts the centre's authority.
        key: of the site.

    Raises:
        ConnectError: if the centre gives no answer, or one that a working SuperLink does not give.
        AuthError: if it refuses the signature, before it looks the key up.
    """
    request = _signed_request(server, key)
    try:
        with httpx.Client(verify=tls, timeout=CALL_TIMEOUT, mounts=dict.fromkeys(_NEVER_PROXIED)) as client:
            answer = client.send(request)
    except httpx.HTTPError as error:
        raise ConnectError(
            f"{server} gives no answer to a signed call ({type(error).__name__}).\n"
            "Try again; if it stays so, ask the centre for its logs/gateway.log."
        ) from error
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise AuthError(
            f"{server} refuses the signature of this site's calls.\n"
            "As a rule the centre's clock is wrong, or the key file is damaged: compare the time and the key's "
            "fingerprint with the centre by telephone ('icmoe-fl site init' shows the fingerprint again)."
        )
    refusal = FlowerError.from_json(answer.text)
    if refusal is not None and refusal.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return True
    if refusal is not None and refusal.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return False
    raise ConnectError(
        f"{server} answers a signed call with HTTP {answer.status_code}, so the centre does not work at the moment.\n"
        "Wait, then ask the centre: its logs/gateway.log and logs/superlink.log say why."
    )


def _signed_request(server: str, key: EllipticCurvePrivateKey) -> httpx.Request:
    message = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=NO_INTERVAL)
    request = httpx.Request(
        "POST",
        f"https://{server}{_PATH}",
        content=message.SerializeToString(deterministic=True),
        headers={"content-type": _MEDIA_TYPE, "accept": _MEDIA_TYPE},
    )
    # Only its headers are wanted: Flower's own client follows redirects, and ends the process where releases differ.
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(
        ProtobufRequestContext(rpc_method=_METHOD, message=message, request=request), lambda _: httpx.Response(200)
    )
    return request
