package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "example.com/app/torchrelay/v1" // by protoc-gen-go and protoc-gen-go-grpc
)

// explain returns what a gateway says of an error: its stable reason, when to come again, and each bad field.
func explain(err error) (reason string, wait time.Duration, fields []string) {
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = detail.Reason
		case *errdetails.RetryInfo:
			wait = detail.RetryDelay.AsDuration()
		case *errdetails.BadRequest:
			for _, bad := range detail.FieldViolations {
				fields = append(fields, bad.Field+": "+bad.Description)
			}
		}
	}
	return reason, wait, fields
}

func fail(err error) {
	reason, _, fields := explain(err)
	log.Fatalf("%v %s %v", err, reason, fields)
}

func main() {
	transport := credentials.NewTLS(&tls.Config{}) // the system's authorities, the name in the address
	if os.Getenv("TORCHRELAY_INSECURE") != "" {
		transport = insecure.NewCredentials() // on loopback, or where a mesh encrypts
	}
	connection, err := grpc.NewClient(os.Getenv("TORCHRELAY_ADDRESS"), grpc.WithTransportCredentials(transport))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := pb.NewGenerationServiceClient(connection)
	ctx := metadata.AppendToOutgoingContext(context.Background(),
		"authorization", "Bearer "+os.Getenv("TORCHRELAY_API_KEY"))
	stream, err := client.StreamGenerate(ctx, &pb.StreamGenerateRequest{
		Model:           os.Getenv("TORCHRELAY_MODEL"),
		Input:           &pb.GenerationInput{Input: &pb.GenerationInput_Text{Text: "The capital of France is"}},
		Config:          &pb.GenerationConfig{MaxTokens: proto.Uint32(16)},
		DisconnectGrace: durationpb.New(30 * time.Second), // how long it goes on without us
	})
	if err != nil {
		fail(err)
	}
	next := func() (*pb.GenerationEvent, error) {
		response, err := stream.Recv()
		return response.GetEvent(), err
	}
	last := &pb.ResumeGenerationRequest{}
	for {
		event, err := next()
		if err != nil {
			reason, wait, _ := explain(err)
			broken := errors.Is(err, io.EOF) || status.Code(err) == codes.Unavailable || reason == "CLIENT_TOO_SLOW"
			if !broken || last.GenerationId == "" {
				fail(err)
			}
			time.Sleep(wait + time.Duration(rand.Int63n(int64(time.Second)))) // not every caller at once
			resumed, err := client.ResumeGeneration(ctx, last)
			next = func() (*pb.GenerationEvent, error) {
				if err != nil {
					return nil, err
				}
				response, err := resumed.Recv()
				return response.GetEvent(), err
			}
			continue
		}
		if accepted := event.GetAccepted(); accepted != nil {
			last.GenerationId = accepted.GenerationId
		}
		last.AfterSequence, last.ChainHash = event.Sequence, event.ChainHash
		for _, delta := range event.GetDeltas().GetDeltas() {
			fmt.Print(delta.Text)
		}
		if event.GetFinished() != nil {
			return
		}
	}
}
