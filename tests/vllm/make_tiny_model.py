"""Makes a model of a few thousand weights that vLLM serves (`--load-format dummy`), without any
download: `python make_tiny_model.py FOLDER`, with the Python of vLLM's venv (needs tokenizers)."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY, POSITIONS = 4096, 8192  # tokens at most
# vLLM's head size is hidden / heads; its CPU kernels take few: 16 kills the engine on the first
# request, after /health said 200.
HIDDEN, LAYERS, HEADS, KV_HEADS = 128, 2, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ENGLISH = ("the of and to in is that for it as was with be by on not he at are this have from "
           "request token batch cache memory latency throughput queue model weight layer answer")
CHINESE = ("我们在这里测试模型推理服务器的吞吐量和延迟请求进入队列之后调度器会把它们组成批次然后"
           "缓存不足时系统会抢占正在运行的请求并稍后重新计算今天天气很好请问你可以帮助写代码吗")


def corpus(rng: random.Random) -> Iterator[str]:
    """What the tokenizer learns from: enough that words are tokens, as in real ones."""
    for _ in range(3000):
        yield " ".join(rng.choices(ENGLISH.split(), k=12)) + ".\n"
        at = rng.randrange(len(CHINESE) - 12)
        yield CHINESE[at:at + 12] + "。\n"


def tokenizer(path: Path) -> dict[str, int]:
    """Writes tokenizer.json; the ids of the special tokens, which are the last ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(corpus(random.Random(0)), trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in SPECIAL])
    made.save(str(path))
    return {x: made.token_to_id(x) for x in SPECIAL}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer(folder / "tokenizer.json")
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    rows = -(-(max(ids.values()) + 1) // 64) * 64  # of the embedding: Qwen pads it, too
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(i): {"content": x, "special": True, "normalized": False,
                                              "lstrip": False, "rstrip": False,
                                              "single_word": False} for x, i in ids.items()},
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE,
            "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False, "model_max_length": POSITIONS},
        "generation_config.json": {"eos_token_id": [end, pad], "pad_token_id": pad},
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": POSITIONS, "vocab_size": rows, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "initializer_range": 0.02, "tie_word_embeddings": True,
            "bos_token_id": pad, "eos_token_id": end, "torch_dtype": "bfloat16"}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
