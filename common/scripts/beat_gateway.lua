#!lua flags=allow-oom
-- A gateway's heartbeat on a shard: renews its lease, trims what it has read of its reply stream. A lease of 0 gives it up.
-- ARGV  1 gateway  2 lease ms  3 reply TTL ms  4 last entry read
-- Reply 1 if the lease or the stream had been lost: live streams must attach again.
--@include base
--@include jobs
set_schema()
local gid, now = ARGV[1], now_ms()
local stream = P .. 'gw:' .. gid
local had_stream = call('EXISTS', stream)
local is_new = renew_gateway(gid, tonumber(ARGV[2]), tonumber(ARGV[3]), now)
call('XTRIM', stream, 'MINID', ARGV[4])
return (is_new == 1 or had_stream == 0) and 1 or 0
