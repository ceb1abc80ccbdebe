"""The embedded gRPC server: what TensorFlow Serving answers, from one Python process.

tensors.py      TensorProto to numpy and back
servable.py     one loaded version: signatures, warm-up, Predict
directories.py  version directories on disk
versions.py     which of them is loaded, which serves, which failed
service.py      the gRPC services in front of them
status.py       errors that become gRPC status codes
"""
