"""Causal tracing as plainly as it can be said: one run at a time, one row a forward, hooks of torch's own."""

import numpy as np
import torch

from timerome.diffusion import DenoisingLoop, role_positions

RESTORES = {
    "single": lambda step, chosen: step == chosen,
    "from": lambda step, chosen: step >= chosen,
    "until": lambda step, chosen: step <= chosen,
}


class Loop(DenoisingLoop):
    """Predicts in the model's own precision; ``Backbone.logits`` gives float32."""

    def predict(self):
        logits = self.backbone.forward(self.ids)
        shift = self.backbone.shift
        return torch.cat([logits[:, :shift], logits[:, :-shift]], dim=1) if shift else logits


@torch.no_grad()
def denoise(backbone, sequence, ids, sampler, noise=None, site=None, restore=None, record=()):
    """Run one sequence to the end; return states, log-probabilities of the truth, and recorded outputs, by step.

    ``restore(step, ids)`` gives (positions, values) or None.
    """
    loop = Loop(backbone, ids[None], sequence.canvas, sampler)
    states, log_prob, outputs = [], [], []
    while not loop.done and bool((sequence.canvas & (loop.ids[0] == backbone.mask_id)).any()):
        found, handles = {}, []
        if noise is not None:
            handles.append(backbone.embedding.register_forward_hook(lambda m, a, out: out + noise))
        for wanted in record:

            def keep(module, args, out, found=found, wanted=wanted):
                found[wanted] = (out[0] if isinstance(out, tuple) else out)[0].clone()

            handles.append(backbone.module(wanted).register_forward_hook(keep))
        change = restore(loop.step, loop.ids[0]) if restore else None
        if change is not None:

            def put(module, args, out, change=change):
                tensor = (out[0] if isinstance(out, tuple) else out).clone()
                tensor[0, change[0]] = change[1][change[0]]
                return (tensor, *out[1:]) if isinstance(out, tuple) else tensor

            handles.append(backbone.module(site).register_forward_hook(put))
        event = loop.advance()
        for handle in handles:
            handle.remove()
        states.append(event.ids[0])
        truth = sequence.ids[sequence.canvas]
        log_prob.append(event.logits[0][sequence.canvas].log_softmax(-1)[torch.arange(len(truth)), truth].double())
        outputs.append(found)
    return states, torch.stack(log_prob).numpy(), outputs, loop.ids[0]


def score(states, log_prob, sequence, mask_id):
    """Mean over tokens, a committed one as last predicted, at each step."""
    last = log_prob[0].copy()
    out = []
    for state, now in zip(states, log_prob, strict=True):
        masked = (state[sequence.canvas] == mask_id).numpy()
        last = np.where(masked, now, last)
        out.append(last.mean())
    return np.array(out)


def restoring(backbone, sequence, clean, window, site, role, chosen):
    """The ``restore`` of a coordinate, from a clean run that recorded its site."""
    mask_id = backbone.mask_id

    def restore(step, ids):
        if not RESTORES[window](step, chosen):
            return None
        positions = role_positions(sequence, ids, role, mask_id)
        if role == "object":
            positions &= role_positions(sequence, clean[0][step], role, mask_id)
            positions = backbone.reads_from(positions)
        return positions, clean[2][step][site]

    return restore


def effects(backbone, sequence, inputs, sampler, window, site, role, chosen):
    """Of one coordinate for one fact: (effect, total effect) on later steps, and the same on its own step, in nats."""
    mask_id = backbone.mask_id
    clean = denoise(backbone, sequence, sequence.masked(mask_id), sampler, record=[site])
    clean_score = score(*clean[:2], sequence, mask_id)
    corrupted_scores, restored_scores, same = [], [], []
    for given in inputs:
        corrupted = denoise(backbone, sequence, given.ids, sampler, given.noise)
        restore = restoring(backbone, sequence, clean, window, site, role, chosen)
        restored = denoise(backbone, sequence, given.ids, sampler, given.noise, site, restore)
        corrupted_scores.append(score(*corrupted[:2], sequence, mask_id))
        restored_scores.append(score(*restored[:2], sequence, mask_id))
        masked = np.logical_and.reduce(
            [(run[0][chosen][sequence.canvas] == mask_id).numpy() for run in (clean, corrupted, restored)]
        )
        same.append([run[1][chosen][masked].mean() if masked.any() else np.nan for run in (restored, corrupted, clean)])
    later = slice(chosen + 1, None)
    r, c, k = (x[later].mean() for x in (np.mean(restored_scores, 0), np.mean(corrupted_scores, 0), clean_score))
    r0, c0, k0 = np.nanmean(np.array(same), axis=0)
    return (r - c, k - c), (r0 - c0, k0 - c0)
