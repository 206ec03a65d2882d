"""ELMo in NumPy, float64, a word and a step at a time, straight from the formulas of bilm-tf and TensorFlow.

`p`: the parameters as nested dicts; `c`: an ELMoConfig. `drop(x)` is dropout, called where bilm-tf has it.
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def encode(p, c, characters):
    """[U, P] for ids [U, 50]."""
    words = []
    for row in characters:
        x = p["characters"]["embedding"][row]
        features = []
        for i, (width, number) in enumerate(c.filters):
            kernel, bias = p["encoder"][f"convolution_{i}"]["kernel"], p["encoder"][f"convolution_{i}"]["bias"]
            answers = [
                [(x[t : t + width] * kernel[:, :, n]).sum() + bias[n] for n in range(number)]
                for t in range(len(row) - width + 1)
            ]
            features.append(np.max(answers, 0))
        y = np.concatenate(features)
        y = np.maximum(y, 0) if c.activation == "relu" else np.tanh(y)
        for i in range(c.num_highways):
            layer = p["encoder"][f"highway_{i}"]
            gate = sigmoid(y @ layer["carry"]["kernel"] + layer["carry"]["bias"])
            new = np.maximum(y @ layer["transform"]["kernel"] + layer["transform"]["bias"], 0)
            y = gate * new + (1 - gate) * y
        words.append(y @ p["encoder"]["projection"]["kernel"] + p["encoder"]["projection"]["bias"])
    return np.stack(words)


def lstm_step(layer, c, x, cell, hidden):
    """TensorFlow's LSTMCell with num_proj, cell_clip and proj_clip; [B, …]."""
    i, j, f, o = np.split(np.concatenate([x, hidden], 1) @ layer["kernel"] + layer["bias"], 4, 1)
    cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(j)
    cell = np.clip(cell, -c.cell_clip, c.cell_clip)
    hidden = (sigmoid(o) * np.tanh(cell)) @ layer["projection"]["kernel"]
    return cell, np.clip(hidden, -c.projection_clip, c.projection_clip)


def direction(layers, c, x, carry, drop=lambda x: x):
    """The outputs [B, T, P] of each layer for inputs [B, T, P] in the order in which they are read, and the states."""
    outputs, states = [], {}
    for i in range(c.num_layers):
        name = f"layer_{i}"
        cell, hidden = carry[name]["cell"], carry[name]["hidden"]
        x, steps = drop(x), []
        for t in range(x.shape[1]):
            cell, hidden = lstm_step(layers[name], c, x[:, t], cell, hidden)
            steps.append(hidden + x[:, t] if c.use_skip_connections and i else hidden)
        x = np.stack(steps, 1)
        outputs.append(x)
        states[name] = {"cell": cell, "hidden": hidden}
    return outputs, states


def full_nll(p, c, x, target):
    """Of one place, among the whole vocabulary."""
    logits = p["softmax"]["embedding"][: c.vocab_size] @ x + p["softmax"]["bias"][: c.vocab_size]
    return np.log(np.exp(logits).sum()) - logits[target]


def sampled_nll(p, c, x, target, negatives, tries):
    """Of one place, as tf.nn.sampled_softmax_loss over candidates of tf.random.log_uniform_candidate_sampler."""

    def logit(k):
        probability = (math.log(k + 2) - math.log(k + 1)) / math.log(c.vocab_size + 1)
        expected = probability * len(negatives) if tries == len(negatives) else 1 - (1 - probability) ** tries
        return p["softmax"]["embedding"][k] @ x + p["softmax"]["bias"][k] - math.log(expected)

    others = [math.exp(logit(int(k))) for k in negatives if k != target]
    return math.log(math.exp(logit(int(target))) + sum(others)) - logit(int(target))


def losses(p, c, batch, carry, drop=None):
    """{direction: weighted sum} and the new states; with `drop` (of a direction and an array) it is training."""
    words, sums, states = encode(p, c, batch["characters"]), {}, {}
    for d in ("forward", "backward"):
        dropped = (lambda x, d=d: drop(d, x)) if drop else (lambda x: x)
        outputs, states[d] = direction(p[d], c, words[batch[f"{d}_words"]], carry[d], dropped)
        x, total = dropped(outputs[-1]), 0.0
        for b, t in np.ndindex(*batch[f"{d}_targets"].shape):
            target = batch[f"{d}_targets"][b, t]
            if drop and c.num_negatives:
                nll = sampled_nll(p, c, x[b, t], target, batch[f"{d}_negatives"], batch[f"{d}_tries"])
            else:
                nll = full_nll(p, c, x[b, t], target)
            total += batch[f"{d}_weights"][b, t] * nll
        sums[f"{d}_loss"] = total
    return sums, states
