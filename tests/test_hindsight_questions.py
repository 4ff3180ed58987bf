"""The policy as an asker: one generation a question, with the question's own key."""

from collections import Counter

import numpy as np

from hintsd_jax.hindsight.questions import Question, policy_asker
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Sampling, SamplingStats
from tests.helpers import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER)


class Engine:
    """Answers every job with its own prompt; keeps the jobs."""

    def run(self, params, jobs):
        self.jobs = jobs
        for job in jobs:
            job.submit([*job.prompt[:3], CHAT.stop_ids[0]], [0.0] * 4, True)
            assert job.collect() is None
        return SamplingStats(sampled_tokens=4 * len(jobs))


def ask(*contents, context=200):
    engine, sampling = Engine(), Sampling(0.6, 0.95, 0, 50)
    questions = [
        Question(str(n), ({"role": "user", "content": text},), np.array([n, 7], np.uint32))
        for n, text in enumerate(contents)
    ]
    return policy_asker(engine, None, CHAT, sampling, context)(questions), engine.jobs


def test_questions_are_generations_of_the_engine():
    answers, jobs = ask("Why?", "How so?")
    assert (
        answers.texts == [CHAT.decode(job.prompt[:3]) for job in jobs]
        and answers.tokens == 8
        and answers.dropped == Counter()
    )
    assert [TOKENIZER.decode(job.prompt) for job in jobs] == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("Why?", "How so?")
    ]
    assert [job.key.tolist() for job in jobs] == [[0, 7], [1, 7]] and {
        (job.context, job.sampling.max_tokens) for job in jobs
    } == {(200, 50)}


def test_what_leaves_no_room_for_an_answer_is_not_asked():
    answers, jobs = ask("Why?", "Why? " * 200, "How?")
    assert [text is None for text in answers.texts] == [False, True, False] and len(jobs) == 2
    assert answers.dropped == Counter(prompt_too_long=1)


def test_an_answer_may_say_when_it_is_complete():
    asked = Question("q", ({"role": "user", "content": "Why?"},), np.zeros(2, np.uint32), lambda text: "b" in text)
    engine, sampling = Engine(), Sampling(0.6, 0.95, 0, 50)
    answers = policy_asker(engine, None, CHAT, sampling, 200)([asked])
    (job,) = engine.jobs
    assert answers.cut == [False] and sampling.is_complete is None
    assert job.sampling.is_complete(CHAT.encode("a b c")) and not job.sampling.is_complete(CHAT.encode("a c"))
    job.submit([5], [0.0], False)
    assert job.cut
