"""Fine-tuning: data in one normal form, batches by true length, what trains, the trainer.

Importing it costs no torch; the parts are imported by name.
"""
