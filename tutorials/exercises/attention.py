"""Exercises of chapter 6: attention.

Replace each `raise NotImplementedError` with your own code. Then run

    python -m pytest tutorials/exercises/attention.py

Everywhere, `weights` is an attention matrix (..., S, S) after softmax: rows are those who attend,
columns those who are attended to, and each row sums to one. Text tokens come first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


# ------------------------------------------------------------------- 1. ★ A louder word, 10 minutes


def louder(weights: Tensor, tokens: list[int], factor: float, L: int) -> Tensor:
    """The weights (B, H, S, S) when every image token attends to these text tokens `factor` times
    as much, compared with all others. Rows still sum to one; the rows of the L text tokens stay as
    they are; the given tensor is not changed.

    Hint: multiply, then divide each row by its new sum. Put it into the model by
    `attention_through`, as in the chapter, and generate "a fox next to a red apple" with a louder
    apple."""
    raise NotImplementedError


def test_a_factor_of_one_changes_nothing():
    weights = random_weights(1, 2, 6, 6)
    assert torch.allclose(louder(weights.clone(), [1], 1.0, L=3), weights), (
        "a factor of 1 should change nothing")


def test_rows_still_sum_to_one():
    sums = louder(random_weights(1, 2, 6, 6), [0, 2], 10.0, L=3).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)), (
        "divide after you multiply: each row should sum to one")


def test_the_word_gains_by_the_factor_over_each_other_token():
    weights = random_weights(1, 2, 6, 6)
    new = louder(weights.clone(), [1], 10.0, L=3)
    before, after = weights[..., 3:, 1] / weights[..., 3:, 4], new[..., 3:, 1] / new[..., 3:, 4]
    assert torch.allclose(after, 10 * before), (
        "compared with any other token, an image token should attend 10 times as much to the word")


def test_the_rows_of_the_words_stay_as_they_are():
    weights = random_weights(1, 2, 6, 6)
    new = louder(weights.clone(), [1], 10.0, L=3)
    assert torch.allclose(new[..., :3, :], weights[..., :3, :]), (
        "only image tokens should hear the word louder: the first L rows are text tokens")


def test_the_given_weights_are_not_changed():
    weights = random_weights(1, 2, 6, 6)
    copy = weights.clone()
    louder(weights, [1], 10.0, L=3)
    assert torch.equal(weights, copy), "return a new tensor: the given one was changed in place"


# ------------------------------------------------------------ 2. ★★ How sharp is a head, 15 minutes


def entropy(weights: Tensor) -> Tensor:
    """The mean entropy of the rows of each head, in bits: weights (H, S, S) -> (H,).

    The entropy of a row p is -sum(p log2 p): 0 bits if one token gets everything, log2(S) bits if
    all get the same. 2 to the entropy is about the number of tokens that a row attends to.

    Hint: 0 log 0 counts as 0, but the computer thinks it is nan."""
    raise NotImplementedError


def test_even_attention_has_as_many_bits_as_it_takes_to_number_the_tokens():
    bits = entropy(torch.full((2, 8, 8), 1 / 8))
    assert tuple(bits.shape) == (2,), f"one number for each of the 2 heads, yours: {bits.shape}"
    assert torch.allclose(bits, torch.tensor([3.0, 3.0])), (
        f"8 tokens with equal shares are 3 bits, not {bits.tolist()}: is the logarithm to base 2?")


def test_attention_to_a_single_token_has_no_bits():
    bits = entropy(torch.eye(5)[None])
    assert torch.allclose(bits, torch.zeros(1)), (
        f"a row that attends to one token alone has 0 bits, yours: {bits.tolist()}")


def test_heads_are_not_mixed():
    bits = entropy(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)]))
    assert torch.allclose(bits, torch.tensor([0.0, 2.0])), (
        f"a sharp and an even head have 0 and 2 bits, yours: {bits.tolist()}")


# ----------------------------------------------------------- 3. ★★ How far do they look, 20 minutes


def distance(weights: Tensor, h: int, w: int) -> Tensor:
    """How far each head looks: weights (H, N, N) between the patches of an image of h x w patches
    -> (H,), in patches.

    For each patch, the mean distance to the patches it attends to, weighted by the shares; then the
    mean over all patches. The shares among patches do not sum to one, since a part goes to the
    text: divide by their sum first. The distance of two patches is that of their centres.

    Hint: patch i lies in row i // w and column i % w. Which heads of the model look at
    neighbours?"""
    raise NotImplementedError


def test_a_patch_that_attends_to_itself_looks_nowhere():
    assert torch.allclose(distance(torch.eye(6)[None], 2, 3), torch.zeros(1)), (
        "who attends to itself alone looks 0 patches far")


def test_neighbours_are_one_patch_away():
    right = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0]]).float()
    assert torch.allclose(distance(right[None], 1, 3), torch.ones(1)), (
        "each patch attends to a neighbour: that is a distance of 1")


def test_rows_and_columns_are_not_confused():
    weights = torch.zeros(1, 6, 6)
    weights[0, :, 1] = 1                                    # all look at the second patch
    expected = torch.tensor([(1 + 0 + 1 + 2**0.5 + 1 + 2**0.5) / 6])
    mine = distance(weights, 2, 3)
    assert torch.allclose(mine, expected), (
        f"in 2 rows of 3 patches the mean distance to the second is {expected.item():.3f}, yours "
        f"{mine.item():.3f}")


def test_what_goes_to_the_text_does_not_count():
    weights = random_weights(2, 6, 6)
    assert torch.allclose(distance(weights, 2, 3), distance(0.5 * weights, 2, 3)), (
        "divide by the sum of the shares: half of the attention may go to the text")


# ------------------------------------------------------------------ 4. ★★★ Concept maps, 30 minutes


def concept_maps(output: Tensor, L: int, concepts: list[list[int]]) -> Tensor:
    """Which concept each patch looks like: output (B, S, C) of an attention -> (B, N, concepts).

    ConceptAttention compares what attention *returned*, not its shares: each token's output is a
    vector of C numbers, and a patch belongs to the words whose output is similar. For each concept,
    take the mean output of its text tokens; multiply each patch's output with it; then let the
    concepts compete for each patch by a softmax over the concepts.

    Hint: `seen[block].output` of `watch`. Two matrix products and no loop over patches."""
    raise NotImplementedError


def planted() -> tuple[Tensor, Tensor]:
    """Outputs of 4 text tokens and 5 patches; patches 0, 1 resemble token 1, the others 2 and 3."""
    directions = 4 * torch.eye(6)
    text = directions[[0, 1, 2, 3]]
    image = torch.stack([directions[1], directions[1], *3 * [(directions[2] + directions[3]) / 2]])
    return torch.cat([text, image])[None], torch.tensor([0, 0, 1, 1, 1])


def test_each_patch_goes_to_the_concept_it_resembles():
    output, truth = planted()
    maps = concept_maps(output, 4, [[1], [2, 3]])
    shape = tuple(maps.shape)
    assert shape == (1, 5, 2), f"expected the shape (1, 5, 2), yours: {shape}"
    assert torch.equal(maps[0].argmax(-1), truth), (
        f"patches belong to the concepts {truth.tolist()}, yours: {maps[0].argmax(-1).tolist()}")


def test_the_concepts_share_each_patch():
    output = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    sums = concept_maps(output, 4, [[1], [2, 3], [0]]).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)), (
        "softmax goes over the concepts: those of one patch should sum to one")


def test_a_concept_of_several_tokens_is_their_mean():
    output = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    image, text = output[0, 4:], output[0, :4]
    expected = F.softmax(image @ torch.stack([text[1], (text[2] + text[3]) / 2]).T, dim=-1)
    assert torch.allclose(concept_maps(output, 4, [[1], [2, 3]])[0], expected, atol=1e-6), (
        "a concept is the mean of the outputs of its tokens, not their sum")
