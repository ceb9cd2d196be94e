"""Part 4, from a copied folder, trains. Its batches are looked at in test_augmentation.py."""

import pytest

from conftest import Part
from lightning_tests import (  # noqa: F401 - they are run for `part`
    test_killed_or_interrupted_and_resumed_ends_like_an_uninterrupted_run,
    test_training_finds_nails_and_leaves_what_it_should,
    test_two_processes_give_the_metrics_of_one,
    test_two_processes_train,
    trained,
)
from reliability_tests import (  # noqa: F401 - all of them are run for part 3, which has the same code
    run,
    small_root,
    test_a_full_disk_leaves_the_last_checkpoint,
    test_chance_follows_from_the_seed_alone,
)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part4_kornia", tmp_path_factory.mktemp("copied alone"))
