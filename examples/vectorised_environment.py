"""A vectorised environment: several simulations, each in a process, stepped together by one player.

The player sends every environment an action and gets an observation, an image of 84 x 84 x 4, a reward, and whether the
episode is over: plain Python values with an array among them, over one `spoolipc.Queue` each way. With `writable=True`
an observation can be changed where it is, as one from `multiprocessing.Queue` can.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from typing import Any

import numpy as np

from spoolipc import Queue


class Simulation:
    """A ball that is pushed left or right; the episode is over when it leaves the field."""

    def __init__(self, number: int) -> None:
        self.random = np.random.default_rng(number)
        self.place = 42

    def step(self, action: str) -> tuple[np.ndarray[Any, Any], float, bool]:
        """The image, the reward, and whether it is over."""
        self.place += {"left": -3, "right": 3}[action] + int(self.random.integers(-2, 3))
        is_over = not 0 <= self.place < 84
        if is_over:
            self.place = 42
        image = np.zeros((84, 84, 4), np.uint8)
        image[:, self.place] = 255
        return image, -1.0 if is_over else 1.0, is_over


def simulate(number: int, actions: Queue, observations: Queue) -> None:
    """What the process of an environment does."""
    simulation = Simulation(number)
    while (action := actions.get()) is not None:
        observations.put((number, simulation.step(action)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=int, default=4, help="how many there are (default 4)")
    parser.add_argument("--steps", type=int, default=200, help="how often all are stepped (default 200)")
    options = parser.parse_args()
    if options.environments < 1 or options.steps < 1:
        parser.error("--environments and --steps must be at least 1")

    observations = Queue(writable=True)
    actions = [Queue() for _ in range(options.environments)]
    processes = [
        multiprocessing.Process(target=simulate, args=(number, queue, observations), daemon=True)
        for number, queue in enumerate(actions)
    ]
    for process in processes:
        process.start()
    choices = ["left"] * options.environments
    reward, episodes = 0.0, 0
    start = time.perf_counter()
    for _ in range(options.steps):
        for queue, choice in zip(actions, choices, strict=True):
            queue.put(choice)
        for _ in actions:
            number, (image, earned, is_over) = observations.get()
            image //= 255  # in place
            place = int(image[0, :, 0].argmax())
            choices[number] = "left" if place > 42 else "right"
            reward += earned
            episodes += is_over
    seconds = time.perf_counter() - start
    for queue in actions:
        queue.put(None)
    for process in processes:
        process.join()

    steps = options.steps * options.environments
    print(
        f"{steps} steps of {options.environments} environments in {seconds:.1f} s: {steps / seconds:.0f} a second"
    )
    print(f"reward {reward:.0f} of {steps}, {episodes} episodes ended early")
    print(f"the player kept every ball in the field: {reward == steps}")
    sys.exit(reward != steps)


if __name__ == "__main__":
    main()
