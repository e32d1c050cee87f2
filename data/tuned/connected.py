"""CC-Tuning's connection in Hugging Face transformers. train.py copies this file beside its result.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # connected
    model = connect(AutoModelForCausalLM.from_pretrained(FOLDER), FOLDER)         # the same, by hand

These hooks on the family's own class (llama, mistral, qwen2, qwen3, smollm3) are CCTuning.prefill of
cctuning.py once more: whoever changes one changes both. A forward that reads prompts runs the decoder
twice: for H at the connection position p, then as the caller asked, with the vector fused at p.

p follows from the ids: it is connection_index from the end of a row's last *marker*, the ids that every
prompt in the chat template ends with. So a row may be padded on either side, continue with an answer, or
begin in a cache. A row without a marker is not connected. B rows, T tokens, L layers, d hidden size.
"""
import warnings

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

INPUTS = {  # what a forward shares with its first pass; the cache has two names in transformers
    "input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "cache", "use_cache"}


def connect(model, folder):
    """Connect a transformers model through the Transform Matrix in its folder. Returns the model."""
    info = getattr(model.config, "cctuning", {})
    if info.get("source_layer") != "decision_maker" or not info.get("marker"):
        raise ValueError(f"{folder}: config.json has no marker, or another source_layer; use infer.py")
    model.connection = Connection(model, info, load_file(cached_file(folder, "cctuning.safetensors")))
    return model


class Connection:
    """The hooks, and what they hand to each other during one forward."""

    def __init__(self, model, info, tensors):
        self.marker, self.index = torch.tensor(info["marker"]), info["connection_index"]
        self.decision_maker = tensors["decision_maker.weight"].float()  # W_d (L, d)
        self.matrix = tensors["transform_matrix"].float()               # W (d, d)
        self.at = None         # (each row, its p), two tensors (B,): the index of the connection
        self.collected = None  # in the first pass: FFN outputs there, (B, d) of each layer
        self.vector = None     # in the second pass: what is fused there (B, d)
        self.warned = False
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(self.collect)
        model.model.layers[info["fusion_layer"]].mlp.register_forward_hook(self.fuse)
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)  # also if the forward fails

    def find(self, ids):
        """The connection position of each row of ids (B, T), on the CPU: (B,). Negative: it has none."""
        ids, size = ids.cpu(), len(self.marker)
        windows = torch.nn.functional.pad(ids, (size - 1, 0), value=-1).unfold(1, size, 1)  # (B, T, size)
        is_end = (windows == self.marker).all(-1)  # (B, T)
        return (is_end * torch.arange(1, ids.shape[1] + 1)).amax(-1) + self.index

    @torch.no_grad()
    def before(self, model, args, kwargs):
        """Before a forward: if its ids have prompts, the first pass, and the vector to fuse."""
        ids = args[0] if args else kwargs["input_ids"]  # (B, T)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        was_read = getattr(cache, "has_prompts", False)  # an earlier forward read the prompts
        if cache is not None and ids.shape[1] == 1 or was_read and len(self.marker) == 1:
            return  # of an answer, in which a line break is not plain's marker
        position = self.find(ids)
        found = position >= 0  # (B,)
        if not (found.all() or was_read or self.warned):
            self.warned = True
            warnings.warn("not connected: a row without a prompt in the chat template", stacklevel=2)
        if not found.any():
            return
        # a. First pass, without connection.
        self.at, self.collected = (torch.arange(len(ids)), position.clamp(min=0)), []
        model.model(*args, **{name: value for name, value in kwargs.items() if name in INPUTS})
        if cache is not None:
            cache.crop(-ids.shape[1])  # the second pass writes these keys and values again
            cache.has_prompts = True
        # b. The vector to fuse, from H W (L, B, d).
        activations = torch.stack([x.to(ids.device) for x in self.collected]) @ self.matrix.to(ids.device)
        embedding = model.get_input_embeddings()(ids[self.at])  # emb(x)[p] (B, d)
        scores = (activations + embedding).mean(0) @ self.decision_maker.T.to(ids.device)  # (B, L)
        self.vector = activations[scores.argmax(-1), self.at[0]] * found[:, None].to(ids.device)
        self.collected = None

    def collect(self, module, inputs, out):
        """After an FFN, in the first pass: keep its output at p."""
        if self.collected is not None:
            self.collected.append(out[self.at].float())

    def fuse(self, module, inputs, out):
        """c. After the fusion layer's FFN, in the second pass: add the vector at p (cctuning.Fusion)."""
        if self.vector is not None:
            out[self.at] += self.vector.to(out)

    def after(self, module, inputs, out):
        self.vector = self.collected = None


class ConnectedModel:
    """What config.json's auto_map names: opens the family's own class, connected."""
    register_for_auto_class = staticmethod(lambda auto_class: None)  # transformers calls it

    @staticmethod
    def from_pretrained(folder, *args, config, **options):
        family = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
        # transformers 4 has just put this class in the family's place, for all folders.
        transformers.AutoModelForCausalLM.register(type(config), family, exist_ok=True)
        return connect(family.from_pretrained(folder, *args, config=config, **options), folder)
