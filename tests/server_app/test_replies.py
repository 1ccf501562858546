from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server_app.replies import read_replies


def question(node: int, identifier: str) -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    message = Message(RecordDict(), node, "train")
    message.metadata.__dict__["_message_id"] = identifier
    return message


def test_replies_are_sorted_by_name_whatever_their_order() -> None:
    messages = {name: question(node, f"id-{name}") for node, name in enumerate("cab", 10)}
    replies = [Message(RecordDict({"from": ConfigRecord({"name": name})}), reply_to=messages[name]) for name in "bca"]
    good, refused = read_replies({f"id-{name}": name for name in "abc"}, replies)
    assert [reply.client for reply in good] == ["a", "b", "c"]
    assert [reply.content["from"]["name"] for reply in good] == ["a", "b", "c"]
    assert refused == []


def test_errors_made_by_the_superlink_find_their_client() -> None:
    """Flower's own errors carry source node 1, so only ``reply_to_message_id`` tells whom they are about."""
    lost = Message(Error(5, "\x1b[31mNode Unavailable\x1b[0m\nno heartbeat"), reply_to=question(77, "id-a"))
    lost.metadata.__dict__["_src_node_id"] = 1
    good, refused = read_replies({"id-a": "a"}, [lost])
    assert good == []
    assert [(refusal.client, refusal.error) for refusal in refused] == [("a", "Flower error 5: no heartbeat")]


def test_missing_foreign_and_repeated_replies() -> None:
    mine = question(1, "id-a")
    reply = Message(RecordDict({"config": ConfigRecord({"number": 1})}), reply_to=mine)
    again = Message(RecordDict({"config": ConfigRecord({"number": 2})}), reply_to=mine)
    foreign = Message(RecordDict(), reply_to=question(2, "id-of-another-run"))
    good, refused = read_replies({"id-a": "a", "id-b": "b"}, [foreign, reply, again])
    assert [(item.client, item.content["config"]["number"]) for item in good] == [("a", 1)]
    assert [(refusal.client, refusal.error) for refusal in refused] == [("b", "no reply before the deadline")]


def test_client_errors_keep_type_reason_and_traceback() -> None:
    record = ConfigRecord({"type": "DataError", "reason": "no images", "traceback": "Traceback: line 1"})
    reply = Message(RecordDict({"error": record}), reply_to=question(1, "id-a"))
    _, (refusal,) = read_replies({"id-a": "a"}, [reply])
    assert (refusal.error, refusal.traceback) == ("DataError: no images", "Traceback: line 1")
