"""Data: manifests of records, decoding, and the tf.data pipeline (the only home of tensorflow)."""
