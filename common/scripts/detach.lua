#!lua flags=allow-oom
-- A gateway's client is gone: the job's disconnect grace begins. Nothing happens when another call has attached since, at
-- this gateway or another: a detach that was long on its way must not end the stream of the call that came after it.
-- ARGV  1 id  2 gateway  3 attach id  4 least grace ms
-- Reply: the job's state afterwards, or nil.
--@include base
--@include jobs
local j = load(ARGV[1])
if not j then return false end
if is_live(j) and j.gw == ARGV[2] and j.ai == ARGV[3] then detach(j, now_ms(), tonumber(ARGV[4] or 0)) end
return j.st
