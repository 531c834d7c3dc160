"""Answers to the exercises of chapter 6, right and wrong ones."""

import torch


def louder(weights, tokens, factor, L):
    new = weights.clone()
    new[..., L:, tokens] *= factor
    return new / new.sum(-1, keepdim=True)


def entropy(weights):
    return -torch.xlogy(weights, weights).sum(-1).mean(-1) / torch.tensor(2.0).log()


def distance(weights, h, w):
    index = torch.arange(h * w)
    places = torch.stack([index // w, index % w], dim=-1).float()
    shares = weights / weights.sum(-1, keepdim=True)
    return (shares * torch.cdist(places, places)).sum(-1).mean(-1)


def concept_maps(output, L, concepts):
    text, image = output[:, :L], output[:, L:]
    means = torch.stack([text[:, tokens].mean(1) for tokens in concepts], dim=1)
    return (image @ means.transpose(1, 2)).softmax(-1)


def not_divided(weights, tokens, factor, L):
    new = weights.clone()
    new[..., L:, tokens] *= factor
    return new


def for_all_rows(weights, tokens, factor, L):
    new = weights.clone()
    new[..., tokens] *= factor
    return new / new.sum(-1, keepdim=True)


def the_rows_of_the_word(weights, tokens, factor, L):
    new = weights.clone()
    new[..., tokens, :] *= factor
    return new / new.sum(-1, keepdim=True)


def in_place(weights, tokens, factor, L):
    weights[..., L:, tokens] *= factor
    return weights / weights.sum(-1, keepdim=True)


def in_nats(weights):
    return -torch.xlogy(weights, weights).sum(-1).mean(-1)


def with_nan(weights):
    return -(weights * weights.log2()).sum(-1).mean(-1)


def over_all_heads(weights):
    return -torch.xlogy(weights, weights).sum(-1).mean().expand(len(weights)) / 0.6931472


def in_columns_of_h(weights, h, w):
    index = torch.arange(h * w)
    places = torch.stack([index // h, index % h], dim=-1).float()
    shares = weights / weights.sum(-1, keepdim=True)
    return (shares * torch.cdist(places, places)).sum(-1).mean(-1)


def of_shares_as_they_are(weights, h, w):
    index = torch.arange(h * w)
    places = torch.stack([index // w, index % w], dim=-1).float()
    return (weights * torch.cdist(places, places)).sum(-1).mean(-1)


def along_the_list(weights, h, w):
    index = torch.arange(h * w).float()
    shares = weights / weights.sum(-1, keepdim=True)
    return (shares * (index[:, None] - index).abs()).sum(-1).mean(-1)


def sums_of_tokens(output, L, concepts):
    text, image = output[:, :L], output[:, L:]
    means = torch.stack([text[:, tokens].sum(1) for tokens in concepts], dim=1)
    return (image @ means.transpose(1, 2)).softmax(-1)


def softmax_over_patches(output, L, concepts):
    text, image = output[:, :L], output[:, L:]
    means = torch.stack([text[:, tokens].mean(1) for tokens in concepts], dim=1)
    return (image @ means.transpose(1, 2)).softmax(1)


def image_first(output, L, concepts):
    N = output.shape[1] - L
    return concept_maps(torch.cat([output[:, N:], output[:, :N]], dim=1), L, concepts)


WRONG = {
    "louder": {not_divided: "divide after you multiply", for_all_rows: "only image tokens",
               the_rows_of_the_word: "10 times as much", in_place: "changed in place"},
    "entropy": {in_nats: "to base 2", with_nan: "has 0 bits", over_all_heads: "0 and 2 bits"},
    "distance": {in_columns_of_h: "the mean distance to the second",
                 of_shares_as_they_are: "may go to the text",
                 along_the_list: "the mean distance to the second"},
    "concept_maps": {sums_of_tokens: "not their sum", softmax_over_patches: "over the concepts",
                     image_first: "belong to the concepts"},
}
