"""Every generator goes on with the numbers that come next."""

import random

import numpy as np
import torch

from preftune.training.generators import generator_tensors, restore_generators


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_the_next_numbers_come_again_also_the_second_of_a_pair_of_normal_ones():
    for _ in range(2):
        drawn()
    random.gauss(0, 1)  # leaves the second of its pair behind, or takes it
    for _ in range(2):
        states = generator_tensors(torch.device("cpu"))
        expected = [drawn(), drawn()]
        drawn()
        restore_generators(states, torch.device("cpu"))
        assert [drawn(), drawn()] == expected
        random.gauss(0, 1)
        np.random.randn()
