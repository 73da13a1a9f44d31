"""Pipelines of the real classes with random weights, a few hundred thousand parameters each; no download."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vgpo.world.pretrain import CAPTION_WORDS, MAX_TOKENS, make_tokenizer

CLIP_WIDTH, T5_WIDTH = 16, 32


def tiny_clip(model=CLIPTextModelWithProjection):
    "A CLIP text encoder for `make_tokenizer`'s words, and the tokenizer."
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=32, projection_dim=CLIP_WIDTH,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=MAX_TOKENS,
        bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    return spread(model(config)), tokenizer


def tiny_t5():
    "A T5 encoder, and a Unigram tokenizer that knows the captions' words and letters."
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *(f"▁{word}" for word in CAPTION_WORDS)]
    scores = [0.0] * 3 + [-9.0] * 27 + [-1.0] * len(CAPTION_WORDS)
    tokenizer = T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1)  # fmt: skip
    return spread(T5EncoderModel(config)), tokenizer


def spread(encoder):
    "A text encoder whose tokens lie far apart, so that prompts differ by more than rounding."
    for table in encoder.modules():
        if isinstance(table, torch.nn.Embedding):
            torch.nn.init.normal_(table.weight, std=0.4)
    return encoder.eval()


def tiny_vae(channels=4):
    "An AutoencoderKL that makes two pixels a side of one latent, with a shift and a scale to be undone."
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, norm_num_groups=4,
        sample_size=16, scaling_factor=1.5, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip


def lively(transformer):
    "A transformer whose output is not nearly zero, as the last layers of these classes start."
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    torch.nn.init.normal_(transformer.proj_out.bias, std=0.3)
    return transformer.eval()


def tiny_sd3(seed=0, **changes):
    "A StableDiffusion3Pipeline with all three text encoders; `changes` go to the transformer's config."
    torch.manual_seed(seed)
    (clip, words), (clip_2, words_2), (t5, pieces) = tiny_clip(), tiny_clip(), tiny_t5()
    settings = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=32, qk_norm="rms_norm",
        pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=12)  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=lively(SD3Transformer2DModel(**{**settings, **changes})), vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clip, tokenizer=words,
        text_encoder_2=clip_2, tokenizer_2=words_2, text_encoder_3=t5, tokenizer_3=pieces)  # fmt: skip


def tiny_flux(seed=0, guidance_embeds=True):
    "A FluxPipeline; the schedule depends on the resolution, with numbers for few tokens."
    torch.manual_seed(seed)
    (clip, words), (t5, pieces) = tiny_clip(CLIPTextModel), tiny_t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6))  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)  # fmt: skip
    return FluxPipeline(
        transformer=lively(transformer), vae=tiny_vae(), scheduler=scheduler, text_encoder=clip, tokenizer=words,
        text_encoder_2=t5, tokenizer_2=pieces)  # fmt: skip


QWEN_TEXT = [  # what a tiny Qwen tokenizer learns whole words from; everything else it spells
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n",
    " photo two red circles blue sign that says",
]
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_qwen_tokenizer():
    "A Qwen2Tokenizer of about 380 tokens: bytes, the words above, the chat's markers and a chat template."
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    letters.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer = letters.train_new_from_iterator(QWEN_TEXT * 2, vocab_size=600, show_progress=False)
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def randomize(module, std, seed=1):
    "Add noise to every parameter: those that start as zeros or ones (biases, gains, pad tokens) must show in results."
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.add_(std * torch.randn(p.shape, generator=generator))


def tiny_qwen_image():
    "A QwenImagePipeline for images of 32 pixels a side: latents (4, 8, 8), 16 image tokens, about 320,000 weights."
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, num_heads=2, hidden_size=16, intermediate_size=16, out_hidden_size=32))  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6))  # fmt: skip
    randomize(transformer, 0.1)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, -0.2], latents_std=[2.8, 1.4, 2.3, 1.1])  # fmt: skip
    randomize(vae, 0.03)
    scheduler = FlowMatchEulerDiscreteScheduler(  # as published, but for the numbers of tokens
        use_dynamic_shifting=True, time_shift_type="exponential", shift=1.0, shift_terminal=0.02,
        base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=64)  # fmt: skip
    pipe = QwenImagePipeline(scheduler, vae, Qwen2_5_VLForConditionalGeneration(config), tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_z_image():
    "A ZImagePipeline for images of 32 pixels a side: latents (4, 16, 16), 64 image tokens, about 450,000 weights."
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, initializer_range=0.2)  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64])  # fmt: skip
    randomize(transformer, 0.1)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip
    randomize(vae, 0.03)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(scheduler, vae, Qwen3Model(config), tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# What Qwen-Image and Z-Image have in common: a language model reads the prompt, so embeddings differ in length

SIGMA = torch.tensor(0.7)
UNEVEN = ["CAT", 'a blue sign that says "CAT" on a very tall pole in the rain', ""]


def changed_by_company(policy, noise):
    "How far the velocity of each UNEVEN prompt in a batch is from that alone; the same if padding is taken for words."
    embeds = policy.encode(UNEVEN)
    untold = embeds._replace(mask=torch.ones_like(embeds.mask))
    with torch.no_grad():
        alone = torch.cat(
            [policy.velocity(x[None], SIGMA, policy.encode([p])) for x, p in zip(noise, UNEVEN, strict=True)]
        )
        return [(policy.velocity(noise, SIGMA, c) - alone).abs().amax((1, 2, 3)) for c in (embeds, untold)]


def check_adapters(policy, x, count):
    "So many adapters are trained; a velocity gives a gradient to them, not zero for a B, and to nothing else."
    policy.add_lora(rank=2, alpha=4)
    policy.velocity(x, SIGMA, policy.encode(UNEVEN)).square().mean().backward()
    assert len(policy.parameters()) == 2 * count
    for name, p in policy.network.named_parameters():  # one without would stop distributed training
        assert (p.grad is not None) == p.requires_grad == (".lora_" in name)
        assert ".lora_B." not in name or p.grad.any()
