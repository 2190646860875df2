"""The command line as each rank calls it."""

import contextlib
import io
import os
import signal
import warnings

from flatprune.cli import main


def call(arguments, at_epoch=None, stop=None):
    """(exit code, stdout, stderr) of a command; rank `stop` gets SIGTERM after that epoch. Alone it is rank 0."""
    rank = int(os.environ.get("RANK", "0"))
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], _stopped(at_epoch, rank == stop), warnings.catch_warnings():
        warnings.filterwarnings("default", message="the checkpoint is of")  # processes of tests ignore warnings
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _stopped(epoch, here):
    from flatprune.training import trainer

    close = trainer.Trainer._close_epoch

    def closing(self):
        record = close(self)
        if here and record["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    trainer.Trainer._close_epoch = closing
    try:
        yield
    finally:
        trainer.Trainer._close_epoch = close


def spoiled(arguments, other, rank):
    """The same where one rank reads the data from another file."""
    from flatprune import Settings

    dataset = Settings.dataset

    def loaded(settings):
        return dataset(settings.changed(data=other) if int(os.environ["RANK"]) == rank else settings)

    Settings.dataset = loaded
    try:
        return call(arguments)
    finally:
        Settings.dataset = dataset
