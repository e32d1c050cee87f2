"""Make the golden folders of models that transformers 4.46 lacks or reads otherwise: qwen3, smollm3, llama_bias, nemo.

    pip install 'transformers>=5' && python tests/golden/make.py      # made with transformers 5.24.0, torch 2.13.0

README.md says what each tensor is. nemo has a tokenizer like Mistral Nemo's (tekken) too: byte-level, [INST] as
control tokens without a space after them; prompts.json has {text: ids of its prompt, and of prompt and answer}.
"""
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SIZES = {"vocab_size": 320, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
         "dtype": "bfloat16"}
MODELS = {
    "qwen3": transformers.Qwen3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "smollm3": transformers.SmolLM3Config(**{**SIZES, "tie_word_embeddings": True, "head_dim": 6}, no_rope_layers=None,
                                          rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "llama_bias": transformers.LlamaConfig(**SIZES, attention_bias=True),
    "nemo": transformers.MistralConfig(**{**SIZES, "head_dim": 12, "num_hidden_layers": 2}, sliding_window=None,
                                       rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}
TEMPLATE = ("{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}"
            "{{- '[INST]' + m['content'] + '[/INST]' }}"
            "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}")
CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["Nini mji mkuu wa Kenya?", "  two  spaces\nand a line\t ", "भारत 😀"]


def make_model(folder, config, seed):
    """Random weights of a size that matters, logits of three right-padded rows, and 12 greedy tokens after each."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_((1 + 0.2 * noise if p.dim() == 1 else 0.25 * noise).bfloat16())
    model.save_pretrained(folder)
    model = model.float()
    lengths = [14, 5, 11]
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    logits, greedy = torch.zeros(3, max(lengths), config.vocab_size), []
    with torch.no_grad():
        for i, n in enumerate(lengths):
            row = torch.randint(3, config.vocab_size, (1, n), generator=generator)
            ids[i, :n], logits[i, :n] = row[0], model(row).logits[0]
            for _ in range(12):
                row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), 1)
            greedy.append(row[0, n:])
    save_file({"input_ids": ids, "lengths": torch.tensor(lengths), "logits": logits, "greedy": torch.stack(greedy)},
              folder / "expected.safetensors")


def make_tokenizer(folder):
    tk, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    tk.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
        vocab_size=300, special_tokens=[AddedToken(text, normalized=False, special=True) for text in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tk, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    fast, prompts = transformers.AutoTokenizer.from_pretrained(folder), {}
    for text in TEXTS:
        dialogue = [{"role": "user", "content": text}, {"role": "assistant", "content": "Nairobi"}]
        prompts[text] = [fast.apply_chat_template(messages, add_generation_prompt=len(messages) == 1)["input_ids"]
                         for messages in (dialogue[:1], dialogue)]
    (folder / "prompts.json").write_text(json.dumps(prompts))


if __name__ == "__main__":
    for seed, (name, config) in enumerate(MODELS.items()):
        shutil.rmtree(HERE / name, ignore_errors=True)
        make_model(HERE / name, config, seed)
    make_tokenizer(HERE / "nemo")
