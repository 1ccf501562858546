"""Health check of a Flower process: ``healthy.py URL [CA]`` exits with 0 if it answers, with 1 and the reason if not.

``https://HOST:PORT/health`` of a SuperLink or a gateway, whose certificate the file CA vouches for;
``http://HOST:PORT/health`` of a SuperNode; ``grpc://HOST:PORT`` of a SuperExec with ``--health-server-address``.
"""

import ssl
import sys
from urllib.parse import urlsplit
from urllib.request import urlopen

SECONDS = 5.0


def check_http(url: str, authority: str | None) -> None:
    """Raise ``OSError`` unless the answer is a success."""
    context = ssl.create_default_context(cafile=authority) if url.startswith("https:") else None
    with urlopen(url, timeout=SECONDS, context=context):
        return


def check_grpc(address: str) -> None:
    """Raise ``OSError`` unless gRPC's health service says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            raise OSError(str(error)) from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise OSError(f"{address} says status {answer.status}, not SERVING")


def main(url: str, authority: str | None = None) -> None:
    """Check one address."""
    target = urlsplit(url)
    try:
        if target.scheme == "grpc":
            check_grpc(target.netloc)
        else:
            check_http(url, authority)
    except OSError as error:
        sys.exit(f"{url} is not healthy: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
