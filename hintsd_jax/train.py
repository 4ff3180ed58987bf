# SPDX-License-Identifier: Apache-2.0

"""The training loop, top to bottom: roll out, look back at the failures, distil the actions that caused them, move the
teacher.

Python calls environments and prompts the analyser between compiled steps. Everything a step does follows from (config,
step, state), so a run that was killed continues from its last checkpoint as if it had not been: task order and keys are
functions of the step, counters travel with the checkpoint, and what the outside world answered is journalled. What the
run writes down is the affair of the `Recorder` around the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax

from hintsd_jax import processes
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.checkpoints.checksums import checksums
from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.evaluate import held_out_test, validation
from hintsd_jax.recorder import Recorder, StepOutcome, is_broken, program_count
from hintsd_jax.results import TrainResult
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.runs import interruption
from hintsd_jax.runs import metrics as run_metrics
from hintsd_jax.session import Session, step_tasks
from hintsd_jax.training.batching import Batch, blank_batch, make_batches
from hintsd_jax.training.state import TrainState, abstract, create
from hintsd_jax.training.train_step import When, update


def train(config: Config, workdir: str) -> TrainResult:
    """Trains in `workdir`, or continues what is there.

    Raises:
      UserError: see `Session.open`, `Workdir.open`, `Checkpoints.restore`; an alarm that stops the run.
      Interrupted: somebody asked for the end; rollouts, analysis and evaluations before and after all are given up, an
        update and the evaluation that belongs to its row are finished, and the last completed step is saved.
    """
    run_metrics.compile_count()  # counts from here on
    session = Session.open(config, workdir)
    config = session.config  # the policy's commit is known now
    algorithm, shapes, dialogues = session.algorithm, session.algorithm.batch_shapes(session.mesh), session.dialogues
    tasks = session.tasks(config.tasks.train_split)
    eval_tasks = session.tasks(config.tasks.eval_split, config.eval.tasks)
    loss_settings = {"policy": session.policy, "loss": algorithm.loss, "optim": build.optimizer_config(config)}
    initial = session.trained if build.keeps_initial_weights(config) else None
    reference = initial if algorithm.loss.needs_reference else None
    take_update = partial(update, session.frozen, mesh=session.mesh, reference=reference, **loss_settings)

    with interruption.deferred(), Recorder.open(session, workdir, shapes) as recorder:
        state = first_state(session, recorder)
        if recorder.continues and (finished := recorder.finished()):
            return finished
        with recorder.timer("compile"):
            state = compile_programs(session, state, take_update)
        if not recorder.continues:
            recorder.note(f"{len(tasks):,} training tasks; evaluating the starting policy")
            for text in [] if dialogues else session.overlaps(tasks):
                recorder.note(text)
            params = session.weights(state.params)
            before = held_out_test(session, params, recorder.journal("before", 0), recorder.keep_before)
            evaluated = validation(session, params, eval_tasks, recorder.journal("eval", 0))
            recorder.before_training(state, before, evaluated)

        for step in range(recorder.completed_steps, config.optim.steps):
            journal = recorder.begin_step(step + 1)
            with recorder.timer("step"):
                analyser = session.analyser(analysing_weights(config, state, initial), step, journal)
                with session.looking_back(analyser) as looking_back:
                    # -- roll out with the newest weights; offline, take what another policy has said
                    with recorder.timer("rollout"):
                        groups, size = config.tasks.tasks_per_step, config.tasks.rollouts
                        if dialogues:
                            rollouts, episodes = Rollouts.none(), dialogues.of_step(config.seed, step, groups, size)
                        else:
                            chosen = step_tasks(tasks, config.seed, step, groups)
                            params, over = session.weights(state.params), looking_back.over
                            rollouts = session.play(params, chosen, size, step=step, journal=journal, over=over)
                            episodes = rollouts.episodes
                    # -- look back: which steps broke the failed ones, and how they should have gone
                    with recorder.timer("analysis"):
                        hindsight = looking_back.hindsight(rollouts.episodes)
                # -- distil exactly those action spans, then move the teacher
                with recorder.timer("update"):
                    experience = Experience(episodes, hindsight, session.chat, seed=config.seed, step=step)
                    examples, without = algorithm.examples(experience)
                    micro_steps = config.tasks.tasks_per_step if config.loss.mean_of_micro_means else 0
                    batches = make_batches(examples, shapes, algorithm.loss, micro_steps=micro_steps)
                    session.watch.began("batches", len(batches.batches))
                    counted = ticking(batches.batches, session.watch.tick)
                    state, *device_results = take_update(state, counted, When.at(step, recorder.lr_scale))
                    metrics, tokens = jax.device_get(device_results)
            # -- write down: the metrics first, then the checkpoint that stands for them
            evaluated = {}
            if recorder.is_evaluation_step(step + 1) and not is_broken(metrics, prefix=""):
                params = session.weights(state.params)
                # The state before the update is gone: given up here, all steps since the last checkpoint would be lost.
                with recorder.timer("eval"), interruption.kept():
                    evaluated = validation(session, params, eval_tasks, recorder.journal("eval", step + 1))
            outcome = StepOutcome(rollouts, hindsight, batches, without, metrics, tokens, evaluated)
            recorder.after_step(step + 1, state, outcome)
            interruption.check()

        params, journal = session.weights(state.params), recorder.journal("after", config.optim.steps)
        after = held_out_test(session, params, journal, recorder.keep_after)
        return recorder.finish(after)


def first_state(session: Session, recorder: Recorder) -> TrainState:
    """The state that training begins or continues with. The session's own copy of the weights is given up."""
    optim = build.optimizer_config(session.config)
    if not recorder.continues:
        if session.config.fork.path:
            shape = abstract(session.trained, optim)
            session.trained = None
            return recorder.fork(shape)
        state = create(session.trained, optim)
        session.trained = None
        return state
    shape = abstract(session.trained, optim)
    session.trained = None  # gone before what replaces it comes
    return recorder.restore(shape)


def analysing_weights(config: Config, state: TrainState, initial: dict | None) -> dict | None:
    """The weights that the policy looks back with; those of the student where another one does."""
    return {"ema_teacher": state.ema, "initial_policy": initial}.get(config.hindsight.analyser, state.params)


def compile_programs(session: Session, state: TrainState, take_update: Callable) -> TrainState:
    """Compiles everything that the run will need, on empty input: no later step stops for it, whatever the texts. The
    state is donated and comes back as it was, bit for bit.
    """
    shapes = session.algorithm.batch_shapes(session.mesh)
    session.watch.began("programs", program_count(session, shapes))

    def tick() -> None:
        session.watch.tick()
        interruption.check()

    session.engine.compile(session.weights(state.params), tick)
    # Only process 0 keeps compiled programs, so the others may come much later here; CPUs wait 30 s for one another.
    processes.gather(None, "the programs of its own devices")
    blank = (blank_batch(shapes, *shape) for shape in shapes.all())
    state = take_update(state, ticking(blank, tick), When.at(real=False))[0]
    checksums(state)  # as every save does
    return state


def ticking(batches: Iterable[Batch], tick: Callable[[], None]) -> Iterator[Batch]:
    """The batches; each is counted when the next is asked for."""
    for batch in batches:
        yield batch
        tick()
