"""Trains a run: `accelerate launch pipeline/train.py [--config FILE] [--KEY VALUE ...]`."""

from pipeline.config import make_parser, parse
from pipeline.errors import EXIT_PREEMPTED, Preempted
from pipeline.runtime import Runtime, run_entry
from pipeline.trainer import Trainer


def main() -> int:
    config, _ = parse(make_parser("Train a GAN. The same command again goes on from the newest checkpoint."))
    runtime = Runtime(config.runtime, trackers=config.run.trackers, folder=config.folder)
    try:
        Trainer(config, runtime).run()
    except Preempted as stop:
        runtime.say(str(stop))
        return EXIT_PREEMPTED
    finally:
        runtime.close()
    return 0


if __name__ == "__main__":
    run_entry(main)
