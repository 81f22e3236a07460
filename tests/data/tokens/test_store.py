import json
import pickle
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_store import BAD_MANIFESTS, PATCH_NUMS, brightness_encoder, spoil_manifest, store_of_rings

from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.manifest import MANIFEST
from varscale.data.tokens.store import TokenStore, unigram_bit_entropy, unigram_entropy
from varscale.data.transforms import to_model_range
from varscale.errors import TokenStoreError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of_rings(tmp_path_factory.mktemp("store"))


@pytest.fixture
def damaged(tmp_path):
    """A store's folder, and the path of its second shard."""
    opened = store_of_rings(tmp_path)
    return tmp_path, tmp_path / opened.manifest.shards[1].file


def all_tokens():
    pixels, labels = RingsSource(50, 8).load_batch(range(50), [0] * 50)
    return torch.cat(brightness_encoder(to_model_range(pixels)), dim=1), torch.from_numpy(labels)


@settings(max_examples=30)
@given(indices=st.lists(st.integers(0, 49), max_size=40))
def test_tokens_are_the_encoders_in_the_order_asked_for(store, indices):
    tokens_BL, labels_B = store.tokens(indices)
    expected_tokens, expected_labels = all_tokens()
    assert tokens_BL.dtype == labels_B.dtype == torch.int64
    torch.testing.assert_close(tokens_BL, expected_tokens[indices], atol=0, rtol=0)
    torch.testing.assert_close(labels_B, expected_labels[indices], atol=0, rtol=0)
    assert tokens_BL.is_contiguous()


def test_batches_cover_everything_once(store):
    batches = list(store.batches(12))
    assert [len(batch.labels_B) for batch in batches] == [12, 12, 12, 12, 2]
    torch.testing.assert_close(torch.cat([batch.tokens_BL for batch in batches]), all_tokens()[0])


def test_samples_out_of_range_are_refused(store):
    for sample in (-1, 50):
        with pytest.raises(IndexError, match="samples are 0 … 49"):
            store.tokens([0, sample])


def test_unigram_entropy_by_counting(store):
    tokens_BL = all_tokens()[0].tolist()
    entropies = [
        scipy.stats.entropy(list(Counter(row[position] for row in tokens_BL).values())) for position in range(21)
    ]
    assert unigram_entropy(store) == pytest.approx(np.mean(entropies))


def test_unigram_entropy_of_constant_and_uniform_tokens(tmp_path):
    constant = store_of_rings(tmp_path / "a", encode=lambda x: [torch.full((len(x), p * p), 7) for p in PATCH_NUMS])
    assert unigram_entropy(constant) == 0
    calls = []

    def each_code_once(images):
        calls.append(0)
        code = torch.arange(8) + 8 * (len(calls) - 1)
        return [code[:, None].expand(8, side * side) for side in PATCH_NUMS]

    uniform = store_of_rings(tmp_path / "b", 64, encode=each_code_once)
    assert unigram_entropy(uniform) == pytest.approx(np.log(64))


def test_unigram_entropy_of_bits(store):
    """Of each bit by itself: at least that of tokens, and the same where bits say nothing of each other."""
    tokens_BL = all_tokens()[0]
    entropies = [
        sum(scipy.stats.entropy(np.bincount((tokens_BL[:, place].numpy() >> bit) & 1)) for bit in range(6))
        for place in range(21)
    ]
    assert unigram_bit_entropy(store, 6) == pytest.approx(np.mean(entropies))
    assert unigram_bit_entropy(store, 6) > unigram_entropy(store)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_index_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    opened = store_of_rings(
        tmp_path, 16, vocab_size=vocab_size, encode=lambda x: [torch.full((len(x), p * p), top) for p in PATCH_NUMS]
    )
    assert (opened.tokens(range(16)).tokens_BL == top).all()
    assert json.loads((tmp_path / MANIFEST).read_text())["dtype"] == dtype
    assert np.load(tmp_path / opened.manifest.shards[0].file).dtype.name == dtype


def test_a_store_can_be_sent_to_another_process(store):
    copy = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(copy.tokens([3, 40]).tokens_BL, store.tokens([3, 40]).tokens_BL)
    assert len(pickle.dumps(store)) < 4000


def test_first_images_of_a_procedural_store(store):
    part = TokenStore.open(store.directory, num_images=20)
    assert part.num_samples == len(part) == 20
    torch.testing.assert_close(part.tokens(range(20)).tokens_BL, store.tokens(range(20)).tokens_BL)
    with pytest.raises(TokenStoreError, match=r"50 images × 1 views, needed 51 × 1; encode it again to extend it"):
        TokenStore.open(store.directory, num_images=51)


def test_another_tokenizers_fingerprint_is_named(store):
    path = rf"{store.directory}/{MANIFEST}"
    with pytest.raises(TokenStoreError, match=rf"{path}: tokenizer_fingerprint: tokenizer-a, expected tokenizer-b"):
        TokenStore.open(store.directory, "tokenizer-b")


def test_no_store(tmp_path):
    with pytest.raises(TokenStoreError, match=r"no token store \(manifest.json is missing\)"):
        TokenStore.open(tmp_path / "nowhere")


def test_truncated_shard(damaged):
    folder, shard = damaged
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 100)
    for verify in ("auto", "sizes"):
        with pytest.raises(
            TokenStoreError, match=rf"{shard}: shards\[1\]: {size - 100} bytes, expected {size}; encode"
        ):
            TokenStore.open(folder, verify=verify)


def test_missing_shard(damaged):
    folder, shard = damaged
    shard.unlink()
    with pytest.raises(TokenStoreError, match=rf"{shard}: shards\[1\] is missing; encode the store again"):
        TokenStore.open(folder)


def test_flipped_bit(damaged):
    folder, shard = damaged
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TokenStoreError, match=rf"{shard}: shards\[1\]: checksum \w+, expected \w+; encode"):
        TokenStore.open(folder)
    TokenStore.open(folder, verify="sizes")


LIMITED = """
import resource, sys
from varscale.data.tokens.store import TokenStore

resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
print(TokenStore.open(sys.argv[1]).tokens([0, 149]).labels_B.tolist())
"""


@pytest.mark.parametrize(("hard_limit", "message"), [(1024, ""), (64, "let a process open 150 files more (ulimit -n)")])
def test_more_shards_than_files_that_may_be_open(tmp_path, hard_limit, message):
    """Ten views of ImageNet have 1,570; the usual limit is 1,024."""
    store = store_of_rings(tmp_path, 150, shard_images=1, batch_size=1)
    arguments = [sys.executable, "-c", LIMITED, str(tmp_path), str(hard_limit)]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert message in process.stderr
    if not message:
        assert process.stdout == f"{store.tokens([0, 149]).labels_B.tolist()}\n"


def test_shard_of_another_shape(damaged):
    folder, shard = damaged
    manifest = TokenStore.open(folder).manifest
    np.save(shard, np.zeros((16, 5), dtype=np.uint16))
    with pytest.raises(TokenStoreError, match=r"shards\[1\]: uint16 \(16, 5\), expected uint16 \(16, 22\)"):
        TokenStore(folder, manifest)
    shard.write_bytes(b"")
    with pytest.raises(TokenStoreError, match=r"shards\[1\]: not readable"):
        TokenStore(folder, manifest)


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_damaged_manifest(tmp_path, name):
    """One line that names the file and, where the file is JSON, the key."""
    store_of_rings(tmp_path)
    spoil_manifest(tmp_path / MANIFEST, name)
    key = re.sub(r"\.(\d+)", r"[\1]", name.split(" ")[0]) if "." in name else ""
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / MANIFEST}: damaged (")
    assert message.endswith("; encode the store again")
    assert key in message or "shards[1].file: " in message  # the name contradicts the other numbers
    assert "\n" not in message
    assert len(message) < 500
    if name == "missing keys":
        assert "schema: Field required" in message


def test_a_folder_in_the_place_of_the_manifest(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(TokenStoreError, match=rf"{MANIFEST}: not readable \(Is a directory\)"):
        TokenStore.open(tmp_path)
