#!lua flags=allow-oom
-- A worker goes for good. Jobs that it still holds are for the next reap, at once.
-- ARGV  1 worker
-- Reply: number of jobs that it left behind.
--@include base
local wid = ARGV[1]
local info = P .. 'wi:' .. wid
call('DEL', info, info .. ':at', info .. ':drain', P .. 'wc:' .. wid)
local held = call('HLEN', P .. 'w:' .. wid)
if held == 0 then call('ZREM', P .. 'wl', wid) else call('ZADD', P .. 'wl', 'XX', 0, wid) end
return held
