"""The embedded gRPC server: what TensorFlow Serving answers, from one Python process.

limits.py       what a request may ask
tensors.py      TensorProto to numpy and back
signature.py    one signature: Predict's inputs to its outputs
callables.py    what runs it, by the outputs asked for
servable.py     one loaded version: signatures, warm-up
configuration.py  which models, as flags or a ModelServerConfig say it; config_file.py: such a file, looked at again
directories.py  version directories on disk
policy.py       which of them are to serve
versions.py     which of them is loaded, which serves, which failed
models.py       the models by name, and which version a request asks for
batching.py     the queue: which calls run, when, and together with which
api.py          TensorFlow Serving's services: methods and messages
answers.py      what each method answers
service.py      the gRPC server: listens, reads, refuses, stops
status.py       errors that become gRPC status codes
observation.py  what a call was and how it ended, for the access log and metrics
access_log.py   a line a call
metrics.py      counters and histograms of calls; drift.py and known_values.py: of their features and scores
security.py     certificates and tokens
web.py          HTTP and its limits, for monitoring and REST
monitoring.py   metrics, /healthz, /readyz
rest.py         TensorFlow Serving's REST API; rest_json.py: its JSON; rest_worker.py: a process for large JSON
operating.py    all of that, as options.py asks for it
"""
