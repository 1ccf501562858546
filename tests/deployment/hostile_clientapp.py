"""What a device in the wrong hands can run in place of ``flwr-clientapp``: FRAMP's client, whose replies are garbage.

It describes itself like any other, sends noise for an update, and claims more correct answers than it has examples.
"""

import os
from typing import Any

from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

send = run_clientapp.push_message


def send_garbage(client: Any, message: Any, context: Any) -> None:
    """Take the place of Flower's function that hands a reply to the SuperNode."""
    metrics = message.content.metric_records.get("metrics")
    if message.metadata.message_type == "train":
        message.content.config_records["framp"]["payload"] = os.urandom(5000)
    elif metrics is not None:
        metrics["local-correct"] = metrics["local-total"] + 1
    send(client, message, context)


run_clientapp.push_message = send_garbage
flwr_clientapp()
