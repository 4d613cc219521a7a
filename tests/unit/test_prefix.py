"""Keys name content: equal text gives equal keys, anything else does not."""

import json
import random
from array import array

import pytest

from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.prefix import (
    KEY_BYTES,
    checkpoint_fingerprint,
    extend_keys,
    model_root,
    salted,
)

LAYOUT = KVLayout(layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
ROOT = model_root(b"model", LAYOUT)


def keys_of(tokens, root=ROOT, block_size=4):
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, block_size, len(tokens) // block_size)
    return keys


def test_only_full_blocks_have_keys_and_they_are_stable():
    tokens = list(range(1, 11))
    keys = keys_of(tokens)
    assert len(keys) == 2
    assert all(len(key) == KEY_BYTES for key in keys)
    assert keys == keys_of(tokens)
    # Stored next to the KV, they must mean the same to another build on this machine.
    assert keys[0].hex() == "96d33c73eebfb9bcf12f65f0c02b1042"


def test_keys_grow_with_the_text():
    tokens = [random.Random(1).randrange(1000) for _ in range(40)]
    keys: list[bytes] = []
    for blocks in range(11):
        extend_keys(keys, ROOT, tokens, 4, blocks)
        assert keys == keys_of(tokens)[:blocks]


@pytest.mark.parametrize("position", [0, 3, 4, 7])
def test_a_key_depends_on_every_token_before_its_end(position):
    tokens = list(range(12))
    other = [*tokens]
    other[position] += 1
    changed = [a != b for a, b in zip(keys_of(tokens), keys_of(other), strict=True)]
    assert changed == [i >= position // 4 for i in range(3)]


def test_the_same_block_after_another_beginning_is_another_block():
    assert keys_of([1, 2, 3, 4, 9, 9, 9, 9])[1] != keys_of([4, 3, 2, 1, 9, 9, 9, 9])[1]


def test_models_layouts_and_salts_share_nothing():
    roots = [
        ROOT,
        model_root(b"other", LAYOUT),
        model_root(b"model", KVLayout(2, 4, 1, 8, "bfloat16")),
        model_root(b"model", KVLayout(2, 8, 1, 8, "float32")),
        salted(ROOT, "a"),
        salted(ROOT, "b"),
        salted(ROOT, ""),
    ]
    assert len({keys_of(range(4), root)[0] for root in roots}) == len(roots)
    assert salted(ROOT, None) == ROOT


def test_a_salt_that_spells_a_block_is_not_the_key_of_that_block():
    tokens = [104, 105, 106, 107]
    spelt = array("i", tokens).tobytes().decode()
    assert salted(ROOT, spelt) != keys_of(tokens)[0]


def checkpoint(path, *, hidden=64, weights=b"w" * 1000):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden_size": hidden}))
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_fingerprint_is_of_the_content_not_the_place(tmp_path):
    one = checkpoint_fingerprint(checkpoint(tmp_path / "a"))
    assert one == checkpoint_fingerprint(checkpoint(tmp_path / "b"))
    assert one != checkpoint_fingerprint(checkpoint(tmp_path / "c", hidden=128))
    assert one != checkpoint_fingerprint(checkpoint(tmp_path / "d", weights=b"v" * 1000))


def test_a_fingerprint_sees_fine_tuned_weights_of_any_size(tmp_path):
    size = 50 << 20
    base = bytearray(size)
    one = checkpoint_fingerprint(checkpoint(tmp_path / "a", weights=bytes(base)))
    for i in range(0, size, 1 << 12):
        base[i] = 1
    assert one != checkpoint_fingerprint(checkpoint(tmp_path / "b", weights=bytes(base)))
