#!/usr/bin/env bash
# The notebook's training loop in Keras beside configs/wgan_notebook.yaml here: seconds a step on this machine's CPU, in turn.
#   launch/compare_keras.sh [ROUNDS] [--KEY VALUE ...]
# Installs Keras 2 (tf-keras, tensorflow-cpu: 1.7 GB) in an environment of its own, .venv/keras, and takes three steps of
# each in a round (10), after one round that does not count. Options change the configuration here, not the notebook's loop.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=10
if [[ ${1:-} =~ ^[0-9]+$ ]]; then rounds=$1; shift; fi
bin=${PYTHON_BIN:-.venv/bin} keras=.venv/keras
if [ ! -e "$keras/installed" ]; then
  "$bin/python" -m venv "$keras"
  "$keras/bin/pip" install --quiet tensorflow-cpu==2.21.0 tf-keras==2.21.0
  touch "$keras/installed"
fi
# Reads numbers of steps, and answers each when they are taken. Images are float32 (n, 28, 28, 1) in [0, 1].
read -r -d '' notebook <<'END' || true
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
from tf_keras import backend, layers, models, optimizers

images, batch, latents, n_critic, clip = np.load(sys.argv[1]), 64, 100, 5, 0.01

generator = models.Sequential([layers.Input((latents,)), layers.Dense(7 * 7 * 128), layers.Reshape((7, 7, 128))])
for filters, stride in ((128, 2), (64, 2), (32, 1), (1, 1)):
    generator.add(layers.BatchNormalization())
    generator.add(layers.Activation("relu"))
    generator.add(layers.Conv2DTranspose(filters, 5, strides=stride, padding="same"))
generator.add(layers.Activation("sigmoid"))
critic = models.Sequential([layers.Input((28, 28, 1))])
for filters, stride in ((32, 2), (64, 2), (128, 2), (256, 1)):
    critic.add(layers.LeakyReLU(0.2))
    critic.add(layers.Conv2D(filters, 5, strides=stride, padding="same"))
critic.add(layers.Flatten())
critic.add(layers.Dense(1))


def wasserstein(signs, scores):
    return -backend.mean(signs * scores)


def rmsprop():  # the class whose epsilon is outside the root, as in the notebook's Keras
    return optimizers.legacy.RMSprop(learning_rate=5e-5)


critic.compile(loss=wasserstein, optimizer=rmsprop())
critic.trainable = False
adversarial = models.Sequential([generator, critic])
adversarial.compile(loss=wasserstein, optimizer=rmsprop())
real, fake = np.ones((batch, 1)), -np.ones((batch, 1))


def noise():
    return np.random.uniform(-1.0, 1.0, size=(batch, latents))


def step():
    for _ in range(n_critic):
        chosen = images[np.random.randint(0, len(images), size=batch)]
        critic.train_on_batch(chosen, real)
        critic.train_on_batch(generator.predict(noise(), verbose=0), fake)
        for layer in critic.layers:
            layer.set_weights([np.clip(weight, -clip, clip) for weight in layer.get_weights()])
    adversarial.train_on_batch(noise(), real)


for line in sys.stdin:
    for _ in range(int(line)):
        step()
    print("done", flush=True)
END
exec "$bin/python" - "$rounds" "$keras/bin/python" "$notebook" "$@" <<'END'
import subprocess
import sys
import tempfile
from dataclasses import replace
from statistics import median

import numpy as np

from pipeline.benchmarking.measure import ratio, time_in_turn
from pipeline.config import make_parser, parse
from pipeline.data import open_dataset
from pipeline.data.resident import load_split
from pipeline.distributed.failures import closing
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer

STEPS = 3


def main() -> None:
    rounds, interpreter, notebook, *given = sys.argv[1:]
    config, _ = parse(make_parser("train"), ["--config", "wgan_notebook", "--runtime.device", "cpu", *given])
    with closing(Runtime(config.runtime), config) as runtime, tempfile.TemporaryDirectory() as folder:
        images, _ = load_split(open_dataset(config.data), "train")
        np.save(f"{folder}/images.npy", images.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255)
        trainer = Trainer(replace(config, run=replace(config.run, root=folder, trackers=[])), runtime)
        command = [interpreter, "-c", notebook, f"{folder}/images.npy"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keras:

            def take_theirs() -> None:
                print(STEPS, file=keras.stdin, flush=True)
                keras.stdout.readline() or sys.exit(f"{interpreter} has stopped")

            def take_ours() -> None:
                for _ in range(STEPS):
                    trainer.log.begin()
                    trainer.take_step()
                    trainer.log.losses()

            seconds = time_in_turn({"keras": take_theirs, "here": take_ours}, int(rounds), runtime)
            keras.stdin.close()
        trainer.inputs.close()
    theirs, ours = seconds.values()
    ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
    print("| Keras, seconds a step | here | Keras over here (least to most) |", "| ---: | ---: | ---: |", sep="\n")
    print(f"| {median(theirs) / STEPS:.3f} | {median(ours) / STEPS:.3f} "
          f"| {ratio(theirs, ours):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


run_program(main)
END
