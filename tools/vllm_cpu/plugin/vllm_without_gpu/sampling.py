"""Twins of kernels of vLLM 0.32's V2 sampler in plain torch, for T tokens of a vocabulary of V; see `repairs.py`."""

import torch

PRIME, MOST = 1_000_003, 2**63  # seed and position of a token make the seed of its noise


def install():
    from vllm.v1.worker.gpu.sample import logprob, sampler

    own = sampler.gumbel_sample

    def gumbel_sample(logits_TV, state_T, temperature, seed, pos_T, apply_temperature, is_drafting, **more):
        if is_drafting or more.get("logits_cache") is not None:
            return own(logits_TV, state_T, temperature, seed, pos_T, apply_temperature, is_drafting, **more)
        score_TV = logits_TV.float()
        temperature_T, seed_T = temperature[state_T].float(), seed[state_T]
        random_T = temperature_T != 0
        if apply_temperature:
            score_TV = score_TV / torch.where(random_T, temperature_T, 1).unsqueeze(1)
        noise_TV = torch.zeros_like(score_TV)
        for row in random_T.nonzero().flatten().tolist():
            source = torch.Generator().manual_seed((int(seed_T[row]) * PRIME + int(pos_T[row])) % MOST)
            noise_TV[row].exponential_(generator=source).log_().neg_()
        return (score_TV + noise_TV).argmax(-1)

    def compute_token_logprobs(logits_TV, ids_TN):
        return logits_TV.float().log_softmax(-1).gather(-1, ids_TN.to(torch.int64))

    sampler.gumbel_sample = gumbel_sample
    logprob.compute_token_logprobs = compute_token_logprobs
    logprob._ranks_kernel = _Ranks()


class _Ranks:
    """How many logits of a row are as large as that of its token."""

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, out_T, logits_TV, stride, ids_T, vocabulary, **unused):
        out_T.copy_((logits_TV >= logits_TV.gather(-1, ids_T.to(torch.int64).unsqueeze(-1))).sum(-1))
