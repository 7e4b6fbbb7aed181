"""The configuration: its schema, and everything that only knows keys."""

from mmr1_ds.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    CosineLengthConfig,
    CriticConfig,
    CriticModelConfig,
    DataConfig,
    JudgeConfig,
    LoraConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
    RefConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
    ValidationSampling,
    WorkerConfig,
)
