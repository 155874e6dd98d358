"""The driver: on-policy self-distillation of a model, on `transformers.Trainer` and the loss engine."""
