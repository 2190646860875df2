"""The command line as each rank calls it."""

import contextlib
import io
import os
import signal

from flatprune.cli import main


def call(arguments, at_epoch=None, stop=None):
    """(exit code, stdout, stderr) of a command; rank `stop` gets SIGTERM after that epoch."""
    rank = int(os.environ["RANK"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stopped(at_epoch, rank == stop):
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
    import flatprune.runs as runs

    load = runs.load

    def loaded(settings):
        return load(settings.changed(data=other) if int(os.environ["RANK"]) == rank else settings)

    runs.load = loaded
    try:
        return call(arguments)
    finally:
        runs.load = load
