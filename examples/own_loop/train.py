"""Train a small Llama from a loop of your own, at any number of ranks; the only command is torchrun's."""

import sys

import megatron_ds as mds

CONFIG = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True}
STEPS, OUTPUT = int(sys.argv[1]), sys.argv[2]

with mds.session() as ranks:
    model = mds.load_model(CONFIG, tokenizer="examples/pretrain_moby_dick/tokenizer")
    engine = ranks.build_engine(
        model,
        parallel={"tensor": ranks.world_size, "sequence": True},
        deepspeed="ds_configs/zero1_fp32.json",
        optimizer={"lr": 3e-3, "grad_clip": 1.0},
        global_batch_size=8,
        micro_batch_size=4,
    )
    dataset = mds.open_dataset(model, "examples/pretrain_moby_dick/data/valid.txt", seq_length=128)
    for step, batch in zip(range(1, STEPS + 1), engine.batches(dataset)):
        result = engine.train_step(batch, lr=3e-3 * min(1.0, step / 10))
        if ranks.rank == 0:
            print(f"step {step:3d}  loss {result.loss:.4f}  grad {result.grad_norm:.3f}", flush=True)
    engine.save(f"{OUTPUT}/checkpoints")
    engine.export_hf(f"{OUTPUT}/hf")
