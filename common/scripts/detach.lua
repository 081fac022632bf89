#!lua flags=allow-oom
-- A gateway's client is gone: the job's disconnect grace begins. Nothing happens when another gateway has attached since.
-- ARGV  1 id  2 gateway
-- Reply: the job's state afterwards, or nil.
--@include base
--@include jobs
local j = load(ARGV[1])
if not j then return false end
if is_live(j) and j.gw == ARGV[2] then detach(j, now_ms()) end
return j.st
