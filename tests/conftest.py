"""What several test files share.

A test imports `small_training` from this folder: pytest puts it on the path because of this file.
Property tests try the same examples on every run of `make test`; `make fuzz` looks for new ones."""
import os
import random
import signal
import sys
import threading
import time

import pytest
from hypothesis import settings

settings.register_profile('fixed', derandomize=True, deadline=None, database=None)
settings.register_profile('fuzz', deadline=None, database=None, print_blob=True)
settings.load_profile('fixed')

# A job in the background of a script ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

UNTIL = float(os.environ.get('FUZZ_UNTIL', 'inf'))  # set by .ci/fuzz, in seconds since 1970


def pytest_collection_modifyitems(config, items):
    "In another order on every round of `make fuzz`, so that a short budget reaches every test sooner or later."
    if UNTIL < float('inf'): random.Random(config.getoption('--hypothesis-seed')).shuffle(items)


def pytest_runtest_setup(item):
    if time.time() > UNTIL: pytest.skip('the budget of make fuzz is spent')


@pytest.fixture(scope='session')
def bench(tmp_path_factory):
    from small_training import make_bench
    return make_bench(tmp_path_factory.mktemp('bench'))


@pytest.fixture(autouse=True)
def hub_client():
    """The command line may leave the hub's client offline for the rest of the process; the next test begins as this
    one did."""
    client = lambda: sys.modules.get('huggingface_hub.constants')
    before = client().HF_HUB_OFFLINE if client() else os.environ.get('HF_HUB_OFFLINE', '') in ('1', 'ON', 'YES', 'TRUE')
    yield
    if client(): client().HF_HUB_OFFLINE = before


@pytest.fixture(autouse=True)
def no_watcher():
    "A thread that ends its process with its parent belongs to programs, not to a test's own process."
    watching = lambda: {t for t in threading.enumerate() if t.name == 'exit-with-parent'}
    before = watching()
    yield
    assert watching() <= before, 'foundir_v2.process.exit_with_parent was called in the process of the tests'


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory):
    "LLaVA's classes with random weights and a vocabulary of some dozen words, saved like a real model; and its words."
    import torch
    from foundir_v2.caption import PROMPT
    from foundir_v2.vlmjudge import DAMAGES, QUESTION
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)
    folder = tmp_path_factory.mktemp("vlm")
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>",
             *(PROMPT + " USER: ASSISTANT: a cat looks at the bowl .").split(),
             *(w for d in DAMAGES.values() for w in QUESTION.format(damage=d).split())]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
                                        eos_token="</s>", extra_special_tokens={"image_token": "<image>"})
    template = ("{% for m in messages %}USER: {% for c in m.content %}"
                "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
                "{% endfor %}{% endfor %}ASSISTANT: ")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    text = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
                       eos_token_id=3, **small)
    both = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=4, vision_feature_layer=-1,
                       image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    LlavaForConditionalGeneration(both).save_pretrained(folder)
    return folder, set(words)
