"""A judge of one's own behind a server: any program that speaks OpenAI's /v1/chat/completions looks back on failed
episodes.

    python examples/endpoint_judge.py runs/judged

The judge here is a few lines of rules for Desk, in place of a large model, so that the example needs nothing else. It
gets the same question as the policy would, the text of a failed episode, and answers in the same form: the steps that
broke it, and how they should have gone. With a real server everything but `serving` and `judge` stays.
"""

import contextlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hintsd_jax.library import TrainResult, load_config, train


def judge(question: str) -> str:
    """The first step that takes another thing than the user had asked for, by the words of the episode."""
    named, excluded = "", False
    candidates: dict[str, str] = {}
    for number, step in re.findall(r"^#(\d+) (.*?)(?=^#\d+ |\Z)", question[question.index("Task:") :], re.M | re.S):
        action, _, observation = step.partition("\n> ")
        taken = re.match(r'Take (\w+) "(\w+)"', action)
        if taken and named in candidates and (taken[1] == named) == excluded:
            asked = next(label for label in candidates if (label == named) != excluded)
            feedback = f'Use {asked} "{candidates[asked]}".'
            return json.dumps({"failures": [{"step": int(number), "feedback": feedback}]})
        found = re.findall(r'(\w+) "(\w+)"', observation) if observation.startswith("Found ") else []
        candidates = dict(found) or candidates
        if said := re.search(r"(not )?the (\w+) one", observation):
            named, excluded = said[2], bool(said[1])
    return json.dumps({"failures": []})


class Handler(BaseHTTPRequestHandler):
    """The protocol: a POST with the messages, a JSON reply with one choice."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = judge(request["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        reply = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused):
        """Nothing: the trainer's own lines are enough."""


@contextlib.contextmanager
def serving():
    """The address of the judge's server, as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def main(workdir: str, overrides=None) -> TrainResult:
    with serving() as url:
        own = {"hindsight.analyser": "endpoint", "endpoint.url": url, "endpoint.model": "rules"}
        result = train(load_config("desk_smoke", own | (overrides or {})), workdir)
    for record in result.episodes(1):
        for target in (record["hindsight"] or {"targets": []})["targets"]:
            print(f"{record['task_id']}: step {target['step']}: {target['feedback']}")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "runs/judged")
