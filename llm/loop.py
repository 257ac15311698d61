"""Pretraining from a configuration to a finished run folder: data, mesh, state, steps, report."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from core import loop
from core.config import to_dict
from core.distributed import on_first
from core.loop import Task
from core.mesh import local_rows
from core.meter import Meter
from core.prefetch import prefetch
from core.state import State
from llm.config import Experiment
from llm.data.loader import Batch, across_documents, train_batch
from llm.eval.heldout import evaluation_batches, make_evaluate
from llm.generate import sample_texts
from llm.model.flops import training_flops_per_token
from llm.prepare import token_bytes
from llm.report import append_samples, finish
from llm.setup import Setup, set_up
from llm.start import require_same_text, state_at
from llm.step import jit_train_step, put_batch


def train(experiment: Experiment, *, resume: bool = False, profile: int | None = None) -> None:
    """Train until `train.steps`, or until SIGTERM or Ctrl-C, which save and return (`core.loop.train`).

    Raises:
        UserError: for anything in the configuration, the data or the run folder that the user can mend.
    """
    setup = set_up(experiment, resume)
    done = loop.train(lambda: task_of(setup), setup.run, setup.mesh, experiment.checkpoint, profile)
    if done is not None:
        _, samples = done
        on_first(lambda: finish(setup.run, experiment, setup.text, setup.model.count, samples))


def task_of(setup: Setup) -> Task[Batch]:
    """Pretraining as `core.loop` runs it."""
    experiment, mesh, text = setup.experiment, setup.mesh, setup.text
    data, options = experiment.data, experiment.train
    lengths = token_bytes(text.tokenizer, experiment.model.vocab_size)
    measure = make_evaluate(setup.model, options.loss_chunk, lengths, mesh)

    def evaluate(state: State, step: int) -> dict[str, float]:
        return measure(
            state.model, evaluation_batches(experiment, text.heldout, mesh, final=step == options.steps)
        )

    def meter() -> Meter:
        flops = training_flops_per_token(experiment.model, data.sequence_length)
        return Meter("tokens", data.batch_size * data.sequence_length, flops, options.dtype, mesh)

    return Task(
        run=setup.run,
        steps=options.steps,
        eval_every=experiment.eval.every,
        checkpoint=experiment.checkpoint,
        divergence=experiment.divergence,
        state_at=lambda checkpointer, step: state_at(setup, checkpointer, step),
        batches=lambda numbers: _batches(setup, numbers),
        put=lambda batch: put_batch(batch, mesh),
        step=jit_train_step(setup.model, options, setup.optimizer, mesh),
        evaluate=evaluate,
        show=lambda state, step: _sample(setup, state, step),
        meta={"config": to_dict(experiment), **text.identity},
        check=lambda step, meta: require_same_text(setup, step, meta),
        begin=lambda: text.tokenizer.save(setup.run.tokenizer),
        meter=meter,
    )


def _batches(setup: Setup, numbers: Iterable[int]) -> Generator[Batch, None, None]:
    """This process's rows of the batches with these numbers."""
    data = setup.experiment.data
    rows = local_rows(setup.mesh, data.batch_size)

    def read() -> Iterator[Batch]:
        for number in numbers:
            batch = train_batch(setup.text.train, number, data.batch_size, setup.experiment.seed, rows)
            yield batch if data.isolate else across_documents(batch)

    return prefetch(read())


def _sample(setup: Setup, state: State, step: int) -> list[str]:
    """Each of `eval.prompts` and what follows it; also added to the run's samples."""
    experiment, options = setup.experiment, setup.experiment.eval
    if not options.prompts:
        return []
    texts = sample_texts(
        experiment.model,
        state.model,
        setup.text.tokenizer,
        options.prompts,
        options.sample_tokens,
        dtype=experiment.train.dtype,
    )
    samples = [prompt + text for prompt, text in zip(options.prompts, texts, strict=True)]
    on_first(lambda: append_samples(setup.run, step, samples))
    return samples
