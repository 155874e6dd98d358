"""The driver: on-policy self-distillation of a model, on `transformers.Trainer` and the loss engine.

`opsd_train.trainer.OPSDTrainer` trains, `opsd_train.config.OPSDConfig` configures it, `load_rows` of
`opsd_train.data.rows` and `Encoder` of `opsd_train.reading.prompts` make its data; `opsd_train.train` is the
run that the command line starts.
"""
