"""The embedded gRPC server: answers the calls of TensorFlow Serving from one Python process.

limits.py       what a request may ask
tensors.py      TensorProto to numpy and back
signature.py    one signature: Predict's inputs to its outputs
callables.py    the callables that run it, one per set of outputs
servable.py     one loaded version: signatures, warm-up
configuration.py  which models to serve, from flags or a ModelServerConfig; config_file.py: follows such a file
directories.py  version directories on disk
policy.py       which of them should serve
versions.py     which of them are loaded, serve, or failed
models.py       the models by name; finds the version that a request asks for
batching.py     the queue: which calls run, when, and in which batch
api.py          TensorFlow Serving's services: methods and messages
answers.py      the answer of each method
service.py      the gRPC server: listens, reads, refuses, stops
status.py       errors that become gRPC status codes
observation.py  one call and how it ended, for the access log and metrics
access_log.py   one line per call
metrics.py      counters and histograms of calls; drift.py, known_values.py: of features and scores
security.py     certificates and tokens
web.py          HTTP and its limits, for monitoring and REST
monitoring.py   metrics, /healthz, /readyz
rest.py         TensorFlow Serving's REST API; rest_json.py: its JSON; rest_worker.py: a process for large JSON
operating.py    opens all of these, as options.py says
"""
