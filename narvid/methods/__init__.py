"""One file a method: NarVid, and what it is compared with. What each must answer stands in protocol.py."""

from narvid.methods.cap4video import Cap4Video
from narvid.methods.clip2video import CLIP2Video
from narvid.methods.clip4clip import CLIP4Clip
from narvid.methods.internvideo import InternVideo
from narvid.methods.narvid import NarVid
from narvid.methods.zeroshot import ZeroShot

METHODS = {"narvid": NarVid, "clip4clip": CLIP4Clip, "clip2video": CLIP2Video, "cap4video": Cap4Video,
           "zeroshot": ZeroShot, "internvideo": InternVideo}
